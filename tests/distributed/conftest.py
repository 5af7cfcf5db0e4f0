import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """See :class:`support.ranks.Ranks`. All tests use the same two processes."""
    made = Ranks()
    yield made
    made.close()


@pytest.fixture(scope="session")
def four_ranks():
    """Four processes, for slow tests. The first call starts them."""
    made = Ranks(4)
    yield made
    made.close()
