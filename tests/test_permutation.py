"""Orders of units: contiguous where possible, with few units moved, and fast."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.inside import Projection, contiguous_range, coupling_order, element_order, inverse


@settings(deadline=None)
@given(
    count=st.integers(1, 60),
    sizes=st.lists(st.integers(0, 60), min_size=0, max_size=3),
    consumed=st.integers(0, 60),
    seed=st.integers(0, 10**6),
)
def test_nested_producers_and_any_consumer_are_contiguous(count, sizes, consumed, seed):
    ranking, other = (torch.randperm(count, generator=torch.Generator().manual_seed(one)) for one in (seed, seed + 1))
    producers = [ranking[: min(size, count)].sort().values for size in sizes if size]
    consumer = other[: min(consumed, count)].sort().values if consumed else None
    order = coupling_order(count, producers, consumer)
    assert torch.equal(order.sort().values, torch.arange(count))
    selected = set()
    for units in producers + ([] if consumer is None else [consumer]):
        assert contiguous_range(inverse(order)[units]) is not None
        selected |= set(units.tolist())
    assert int((order != torch.arange(count)).sum()) <= 2 * len(selected)


def test_the_sequence_is_producer_only_both_consumer_only():
    order = coupling_order(8, [torch.tensor([1, 5])], torch.tensor([5, 6]))
    assert order[:3].tolist() == [1, 5, 6] and sorted(order.tolist()) == list(range(8))


def test_elements_of_projections_that_share_a_weight():
    """Two heads of q and k with two elements each, side by side or interleaved by head."""
    q, k = (Projection(key, "qk", 2, 2, 0, start=start, size=8) for key, start in (("q", 0), ("k", 4)))
    assert k.elements(torch.tensor([1])).tolist() == [6, 7] and (q.name, k.name) == ("qk.q", "qk.k")
    assert element_order(q, torch.tensor([1, 0])).tolist() == [2, 3, 0, 1, 4, 5, 6, 7]
    assert element_order(k, torch.tensor([1, 0])).tolist() == [0, 1, 2, 3, 6, 7, 4, 5]
    q, k = (Projection(key, "qk", 2, 2, 0, start=start, stride=4, size=8) for key, start in (("q", 0), ("k", 2)))
    assert k.elements(torch.tensor([0, 1])).tolist() == [2, 3, 6, 7]
    assert element_order(q, torch.tensor([1, 0])).tolist() == [4, 5, 2, 3, 0, 1, 6, 7]
    assert element_order(k, torch.tensor([1, 0])).tolist() == [0, 1, 6, 7, 4, 5, 2, 3]


@pytest.mark.parametrize("units,expected", [([3, 2, 4], (2, 5)), ([0], (0, 1)), ([1, 3], None)])
def test_contiguous_range(units, expected):
    assert contiguous_range(torch.tensor(units)) == expected
