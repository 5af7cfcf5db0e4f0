"""base + delta, and writing it into units of any number of weights, in one pass: what a model computes with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from s2ft.ops._library import check_index, define

# Start of a contiguous slice, or the index of every unit, int64 [n]
Units = int | Tensor


def effective_units(base: Tensor, delta: Tensor) -> Tensor:
    """Compute base + delta, summed in the wider dtype and rounded once to the dtype of base.

    Every effective weight is formed by this function or by its compiled equivalent. The weight used in training
    therefore equals, bit for bit, the weight that merging writes.

    Args:
        base: Base values of the selected units, any shape.
        delta: Trained update, with base's shape. Its dtype may be wider.

    Returns:
        The sum, in the dtype of base.

    Example:
        >>> base = torch.ones(2, dtype=torch.bfloat16)
        >>> s2ft.ops.effective_units(base, torch.tensor([0.5, 1e-4]))
        tensor([1.5000, 1.0000], dtype=torch.bfloat16)
    """
    return (base + delta).to(base.dtype)


class Slice(NamedTuple):
    """Units of one weight, and what is written there.

    Attributes:
        weight: The weight, or a view of it, as a matrix. It is changed in place.
        base: Values of the units, in the shape of `delta` and the dtype of `weight`.
        delta: What is added to them: [n, columns] if `dim` is 0, [rows, n] if `dim` is 1.
        units: The first of n neighbouring units, or an index [n] int64.
        dim: Dimension of the units: 0 for rows, 1 for columns.

    Example:
        >>> s2ft.ops.Slice(torch.zeros(3, 2), base=torch.ones(1, 2), delta=torch.ones(1, 2), units=1, dim=0).dim
        0
    """

    weight: Tensor
    base: Tensor
    delta: Tensor
    units: Units
    dim: int


def check(one: Slice) -> None:
    op, weight, dim = "write_slices_", one.weight, one.dim
    if weight.dim() != 2 or dim not in (0, 1):
        raise ValueError(f"{op}: weight must be a matrix and dim 0 or 1, got shape {tuple(weight.shape)} and dim {dim}")
    length = one.delta.shape[dim] if one.delta.dim() == 2 else -1
    shape = (length, weight.shape[1]) if dim == 0 else (weight.shape[0], length)
    if one.delta.shape != shape:
        raise ValueError(
            f"{op}: delta of shape {tuple(one.delta.shape)} must fit weight of shape {tuple(weight.shape)}"
        )
    if one.base.shape != shape or one.base.dtype != weight.dtype:
        raise ValueError(
            f"{op}: base must have delta's shape {shape} and weight's dtype {weight.dtype}, got "
            f"{tuple(one.base.shape)} and {one.base.dtype}"
        )
    if isinstance(one.units, Tensor):
        check_index(op, one.units, length, weight.shape[dim])
    elif not 0 <= one.units <= one.units + length <= weight.shape[dim]:
        raise ValueError(f"{op}: slice {one.units}:{one.units + length} outside 0..{weight.shape[dim]}")


def reference(weight, base, delta, index, start, dim):
    slices = [
        Slice(*rest, first if where is None else where, along)
        for *rest, where, first, along in zip(weight, base, delta, index, start, dim, strict=True)
    ]
    for one in slices:
        check(one)
    for one in slices:
        sums = effective_units(one.base, one.delta)
        if isinstance(one.units, Tensor):  # on the transpose the index is the first dimension: torch writes whole rows
            one.weight.transpose(0, one.dim)[one.units] = sums.transpose(0, one.dim)
        else:
            one.weight.narrow(one.dim, one.units, sums.shape[one.dim]).copy_(sums)


_op = define(
    "write_slices_(Tensor(a!)[] weight, Tensor[] base, Tensor[] delta, Tensor?[] index, int[] start, int[] dim) -> ()",
    reference,
    lambda weight, base, delta, index, start, dim: None,
)


def write_slice(one: Slice) -> None:
    """Write one slice that requires no gradient, in half the time of the host that :func:`write_slices_` takes."""
    index, start = (one.units, 0) if isinstance(one.units, Tensor) else (None, one.units)
    _op([one.weight], [one.base], [one.delta], [index], [start], [one.dim])


def write_slices_(slices: Sequence[Slice]) -> None:
    """Write base + delta into units of weights: ``weight[units] = base + delta``, in one pass for each device.

    Sums are formed in the wider dtype and rounded once, as by :func:`effective_units`. A graph of autograd that was
    recorded before stays valid: the weights' versions do not change. The caller checks that their memory is writable.

    Args:
        slices: The slices. On a GPU the entries of an index are not checked, because the host would wait.

    Raises:
        ValueError: A shape, a dtype or an index is wrong. Nothing has been written then.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> s2ft.ops.write_slices_([s2ft.ops.Slice(weight, torch.ones(1, 2), torch.ones(1, 2), 1, 0)])
        >>> weight.tolist()
        [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    """
    for device in {one.weight.device for one in slices}:
        here = [one for one in slices if one.weight.device == device]
        with torch.no_grad():
            _op(
                [one.weight for one in here],
                [one.base for one in here],
                [one.delta for one in here],
                [one.units if isinstance(one.units, Tensor) else None for one in here],
                [0 if isinstance(one.units, Tensor) else one.units for one in here],
                [one.dim for one in here],
            )
