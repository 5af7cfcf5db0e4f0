"""The suggested learning rate, against the rates that are known to have been good."""

import pytest
from support.inside import rates


@pytest.mark.parametrize("width, good", ((576, 1e-3), (3072, 3e-4), (4096, 2e-4), (4096, 1e-3)))
def test_each_known_rate_is_in_the_range(width, good):
    found = rates.suggested_rate(width)
    assert found["lowest"] <= good <= found["highest"] and f"| {good:.0e}".replace("e-0", "e-") in rates.__doc__


def test_a_wider_model_gets_a_lower_rate_and_none_gets_more_than_the_narrowest_known_model():
    found = [rates.suggested_rate(width)["rate"] for width in (32, 576, 2048, 4096, 8192)]
    assert found == [1e-3, 1e-3, 4e-4, 2e-4, 1e-4]
