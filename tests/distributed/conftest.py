from contextlib import closing

import pytest
from runs import adapters_of_one_process, attached
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """See :class:`support.ranks.Ranks`. All tests use the same two processes."""
    with closing(Ranks()) as made:
        yield made


@pytest.fixture(scope="session")
def one_rank():
    """A process that is the only rank of its group, for what needs a group."""
    with closing(Ranks(1)) as made:
        yield made


@pytest.fixture(scope="session")
def four_ranks():
    """Four processes, for slow tests. The first call starts them."""
    with closing(Ranks(4)) as made:
        yield made


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Adapters that one process trained with twice the accumulation, by case, layout and changes of the config."""
    return adapters_of_one_process(tmp_path_factory, attached)
