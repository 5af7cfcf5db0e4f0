"""The weight that a forward and a backward multiply by: base + delta in the selected units.

This is the reference of what csrc/linear.h does. The sum is written into the weight's own memory
for the length of one GEMM and the base is copied back, bit for bit. So an op stays a function of its
arguments: nothing can go stale when a weight is replaced, loaded, sharded, cast or copied, no second
copy of the slice is kept, and the GEMM sees one dense matrix.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Union

import torch
from torch import Tensor

from s2ft.ops._lock import LOCK, finish_interrupted, unfinished
from s2ft.ops._memory import check_writable

Units = Union[int, Tensor]  # start of a contiguous slice, or the index of every unit, int64 [n]


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
    elif dim == 1:  # index_copy_ on columns walks the matrix element by element; on the transpose it does not
        weight.t()[units] = values.t()
    else:
        weight[units] = values


def _overlaps(weight: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape))


def with_effective_weight(
    weight: Tensor,  # [O, I], the same bits afterwards
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    units: Units,
    dim: int,
    dtype: torch.dtype,
    product: Callable[[Tensor], Tensor],  # takes [O, I] in `dtype`, valid inside it only
) -> Tensor:
    """``product(weight with weight[units] += delta)``.

    Products take what they multiply contiguous: of a view with gaps PyTorch makes a batched product, for which it
    copies a frozen weight once for every row of the batch.
    """
    if weight.dtype != dtype or _overlaps(weight):
        return product(_effective_copy(weight, delta, units, dim, dtype))
    memory = weight.data  # shares memory, not the version counter: the weight counts as unchanged
    check_writable("s2ft", memory)
    with LOCK, _StreamOrder(memory):
        finish_interrupted()
        base = _read(memory, units, delta.shape[dim], dim)
        effective = effective_units(base, delta.detach())
        try:
            try:
                unfinished.append(partial(_write, memory, units, base, dim))
                _write(memory, units, effective, dim)
                return product(memory)
            finally:
                finish_interrupted()
        except BaseException:  # an interrupt may have come while the base was put back
            finish_interrupted()
            raise


def in_turn(op: str, reference: Callable) -> Callable:
    """The reference of an op that changes its first argument: it runs when no other op holds a weight."""

    @wraps(reference)
    def run(weight: Tensor, *args) -> None:
        check_writable(op, weight)
        with LOCK, _StreamOrder(weight):
            finish_interrupted()
            reference(weight, *args)

    return run


class _StreamOrder:
    """Orders what is enqueued inside after all earlier uses of it on the weight's GPU, whatever their stream.

    A stream that is being captured cannot wait for work outside the graph: replays must be ordered by their caller.
    """

    _last: dict[int, torch.cuda.Event] = {}  # of each device

    def __init__(self, weight: Tensor) -> None:
        self.stream = None
        if weight.is_cuda and not torch.cuda.is_current_stream_capturing():
            self.stream = torch.cuda.current_stream(weight.device)

    def __enter__(self) -> None:
        if self.stream is not None and self.stream.device_index in self._last:
            self.stream.wait_event(self._last[self.stream.device_index])

    def __exit__(self, *error) -> None:
        if self.stream is not None:
            self._last.setdefault(self.stream.device_index, torch.cuda.Event()).record(self.stream)


def _effective_copy(weight: Tensor, delta: Tensor, units: Units, dim: int, dtype: torch.dtype) -> Tensor:
    """The effective weight, rounded to the weight's own dtype, as a matrix of its own in `dtype`."""
    with LOCK:
        finish_interrupted()
        copy = weight.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        base = _read(weight, units, delta.shape[dim], dim)
    _write(copy, units, effective_units(base, delta.detach()).to(dtype), dim)
    return copy
