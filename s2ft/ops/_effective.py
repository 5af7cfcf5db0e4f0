"""base + delta: the values of the selected units, and a copy of a whole weight with them."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from s2ft.ops._memory import check_writable

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


def effective_weight(
    weight: Tensor,  # [O, I]
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    units: Units,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Copy a weight with delta added to its units, rounded to the weight's own dtype and then cast to `dtype`."""
    copy = weight.to(dtype=dtype, copy=True)
    if isinstance(units, int):
        base = weight.narrow(dim, units, delta.shape[dim])
        copy.narrow(dim, units, delta.shape[dim]).copy_(effective_units(base, delta.detach()))
        return copy
    sums = effective_units(weight.index_select(dim, units), delta.detach()).to(dtype)
    copy.transpose(0, dim)[units] = sums.transpose(0, dim)  # index_copy_ visits columns element by element
    return copy


def writing(op: str, reference: Callable) -> Callable:
    """Wrap the reference of an op that writes to its first argument, so that it checks that this is possible."""

    @wraps(reference)
    def run(weight: Tensor, *args) -> None:
        check_writable(op, weight)
        reference(weight, *args)

    return run
