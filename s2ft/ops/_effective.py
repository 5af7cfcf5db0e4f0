"""The weight that a forward and a backward multiply by: base + delta in the selected units.

This is the reference of what csrc/linear.h does. The sum is written into the weight's own memory
for the length of one GEMM and the base is copied back, bit for bit. So an op stays a function of its
arguments: nothing can go stale when a weight is replaced, loaded, sharded, cast or copied, no second
copy of the slice is kept, and the GEMM sees one dense matrix.
"""
import threading
from contextlib import contextmanager
from typing import Iterator, Union

import torch
from torch import Tensor

Units = Union[int, Tensor]   # start of a contiguous slice, or the index of every unit, int64 [n]

# Two threads that share a model must not meet inside one weight.
_lock = threading.Lock()


def effective_units(base: Tensor, delta: Tensor) -> Tensor:
    """base + delta, summed in the wider dtype and rounded once to the dtype of base.

    Every place that forms an effective weight calls this or its compiled twin, so that the weight
    trained with is, bit for bit, the weight that merging writes.
    """
    return (base + delta).to(base.dtype)


def _read(weight: Tensor, units: Units, length: int, dim: int) -> Tensor:
    if isinstance(units, int):
        return weight.narrow(dim, units, length).clone()
    return weight.index_select(dim, units)


def _write(weight: Tensor, units: Units, values: Tensor, dim: int) -> None:
    if isinstance(units, int):
        weight.narrow(dim, units, values.shape[dim]).copy_(values)
    elif dim == 1:   # index_copy_ on columns walks the matrix element by element; on the transpose it does not
        weight.t()[units] = values.t()
    else:
        weight[units] = values


def _overlaps(weight: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape))


# Callers make what they multiply contiguous: of a view with gaps PyTorch makes a batched product, for
# which it copies a frozen weight once for every row of the batch.
@contextmanager
def effective_weight(weight: Tensor,   # [O, I], as it was when the block ends
                     delta: Tensor,    # [n, I] if dim == 0 else [O, n]
                     units: Units, dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield weight with ``weight[units] += delta`` in `dtype`, valid inside the block only."""
    if weight.dtype != dtype or _overlaps(weight):
        yield _effective_copy(weight, delta, units, dim, dtype)
        return
    memory = weight.data   # shares memory, not the version counter: the weight counts as unchanged
    with _lock:
        base = _read(memory, units, delta.shape[dim], dim)
        _write(memory, units, effective_units(base, delta), dim)
        try:
            yield memory
        finally:
            _write(memory, units, base, dim)


def _effective_copy(weight: Tensor, delta: Tensor, units: Units, dim: int, dtype: torch.dtype) -> Tensor:
    """The effective weight, rounded to the weight's own dtype, as a matrix of its own in `dtype`."""
    with _lock:
        copy = weight.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        base = _read(weight, units, delta.shape[dim], dim)
    _write(copy, units, effective_units(base, delta).to(dtype), dim)
    return copy
