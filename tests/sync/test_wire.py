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


SENT = to_message([spec()])


@pytest.mark.parametrize(
    "message, words",
    [
        *(
            (to_message([spec(index=torch.tensor(index))]), "a.weight: the positions must ascend")
            for index in ([5, 0], [0, 0], [0, 6], [-1, 0])  # it descends, twice, too large, below zero
        ),
        ({**SENT, "index": SENT["index"][:4] + "AAA="}, "bytes in a list of"),
    ],
)
def test_a_description_that_is_not_valid(message, words):
    with pytest.raises(ValueError, match=words):
        from_message(message)
