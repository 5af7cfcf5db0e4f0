"""The suggested learning rate, against the rates that are known to have been good."""

import pytest
from support.inside import rates

KNOWN = (
    (576, 0.025, 2e-3),
    (576, 0.006, 4e-3),
    (576, 1.0, 3e-5),
    (3072, 0.003, 3e-4),
    (4096, 0.007, 2e-4),
    (4096, 0.007, 1e-3),
)


@pytest.mark.parametrize("width, share, good", KNOWN)
def test_each_known_rate_is_in_the_range(width, share, good):
    found = rates.suggested_rate(width, share)
    assert found["lowest"] <= good <= found["highest"] and f"| {good:.0e}".replace("e-0", "e-") in rates.__doc__


def test_a_wider_model_or_a_larger_slice_gets_a_lower_rate():
    assert [rates.suggested_rate(width, 0.02)["rate"] for width in (32, 576, 2048, 8192)] == [2e-3, 2e-3, 5e-4, 1e-4]
    assert [rates.suggested_rate(576, share)["rate"] for share in (0.001, 0.006, 0.02, 0.5)] == [1e-2, 6e-3, 2e-3, 7e-5]


def test_a_short_run_gets_up_to_twice_the_rate():
    found = [rates.suggested_rate(576, 0.035, updates)["rate"] for updates in (1, 16, 24, 32, 10_000)]
    assert found == [2e-3, 2e-3, 1e-3, 1e-3, 1e-3]
