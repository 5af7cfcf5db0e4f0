import pytest
from support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    """See :class:`support.ranks.Ranks`; the same two processes for all tests."""
    made = Ranks()
    yield made
    made.close()
