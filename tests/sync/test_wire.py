"""The description of slices, and hashes of their base."""

import pytest
import torch
from support.inside import SliceSpec, from_message, hashes_of, to_message


def test_a_hash_depends_on_every_bit_and_place():
    values = torch.randn(3, 8)
    other = values.clone()
    other[1, 5] = torch.nextafter(other[1, 5], torch.tensor(9.0))
    swapped = values.clone()
    swapped[2, [0, 1]] = values[2, [1, 0]]
    assert (hashes_of(values, 0) == hashes_of(other, 0)).tolist() == [True, False, True]
    assert (hashes_of(values, 0) == hashes_of(swapped, 0)).tolist() == [True, True, False]
    assert hashes_of(values[0], 0).numel() == 8


def spec(**changes):
    fields = dict(name="a.weight", shape=(4, 6), dim=1, index=torch.tensor([0, 5]), hashes=torch.tensor([-7, 3]))
    return SliceSpec(**{**fields, **changes})


def test_a_description_comes_back():
    sent = [spec(), spec(name="b.bias", shape=(9,), dim=0, index=torch.arange(9), hashes=torch.arange(9))]
    for one, other in zip(sent, from_message(to_message(sent))):
        assert (one.name, one.shape, one.dim, one.numel) == (other.name, other.shape, other.dim, other.numel)
        assert torch.equal(one.index, other.index) and torch.equal(one.hashes, other.hashes)
    assert spec().values_shape == (4, 2)


@pytest.mark.parametrize(
    "index", [[5, 0], [0, 0], [0, 6], [-1, 0]], ids=["descends", "twice", "too large", "below zero"]
)
def test_positions_that_are_not_valid(index):
    with pytest.raises(ValueError, match="a.weight: the positions must ascend"):
        from_message(to_message([spec(index=torch.tensor(index))]))


def test_a_description_that_is_cut_off():
    message = to_message([spec()])
    with pytest.raises(ValueError, match="bytes in a list of"):
        from_message({**message, "index": message["index"][:4] + "AAA="})
