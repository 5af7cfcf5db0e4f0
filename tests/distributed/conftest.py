import pytest
from runs import adapters_of_one_process, attached
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """See :class:`support.ranks.Ranks`. All tests use the same two processes."""
    made = Ranks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def one_rank():
    """A process that is the only rank of its group, for what needs a group."""
    made = Ranks(1)
    yield made
    made.close()


@pytest.fixture(scope="session")
def four_ranks():
    """Four processes, for slow tests. The first call starts them."""
    made = Ranks(4)
    yield made
    made.close()


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """Adapters that one process trained with twice the accumulation, by case, layout and changes of the config."""
    return adapters_of_one_process(tmp_path_factory, attached)
