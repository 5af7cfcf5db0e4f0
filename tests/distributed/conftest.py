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


one_rank, ranks, four_ranks = map(ranks_of, (1, 2, 4))  # one rank is for what needs a group


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Adapters that one process trained with twice the accumulation, by case, layout and changes of the config."""
    return adapters_of_one_process(tmp_path_factory, attached)
