from contextlib import closing

import pytest
from runs import adapters_of_one_process, attached
from support.ranks import Ranks


def ranks_of(count):
    """A fixture, see :class:`support.ranks.Ranks`. All tests use the same processes; the first call starts them."""

    @pytest.fixture(scope="session")
    def processes():
        with closing(Ranks(count)) as made:
            yield made

    return processes


ranks, four_ranks = ranks_of(2), ranks_of(4)
one_rank = ranks_of(1)  # the only rank of its group, for what needs a group


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Adapters that one process trained with twice the accumulation, by case, layout and changes of the config."""
    return adapters_of_one_process(tmp_path_factory, attached)
