"""The weight that a forward and a backward multiply by: base + delta in the selected units.

This is the reference of csrc/linear.h. The sum is written into the weight's own memory for the time of one matrix
product, and the base is then copied back, bit for bit. An op therefore stays a function of its arguments: nothing is
cached that a replaced, loaded, sharded, cast or copied weight could make stale, no second copy of the slice is kept,
and the product multiplies by one dense matrix.
"""

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor

from s2ft.ops._build import load
from s2ft.ops._lock import LOCK, finish_interrupted, unfinished
from s2ft.ops._memory import check_writable

# Start of a contiguous slice, or the index of every unit, int64 [n]. Of several matrices [matrices, O, I], unit u of
# matrix g has the index g * size + u, where size is the number of units of one matrix.
Units = int | Tensor

_module = load()
_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # DType in csrc/core/numeric.h


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


def _read(weight: Tensor, units: Units, length: int, dim: int) -> Tensor:
    if isinstance(units, int):
        return weight.narrow(dim, units, length).clone()
    if weight.dim() == 3:
        found = _by_unit(weight, dim)[_places(weight, units, dim)]
        return found if dim == 0 else found.t().contiguous()
    return weight.index_select(dim, units)


def _write(weight: Tensor, units: Units, values: Tensor, dim: int) -> None:
    if isinstance(units, int):
        weight.narrow(dim, units, values.shape[dim]).copy_(values)
    elif weight.dim() == 3:
        _by_unit(weight, dim)[_places(weight, units, dim)] = values.transpose(0, dim)
    elif dim == 1:  # index_copy_ visits a matrix's columns element by element; on the transpose it does not
        weight.t()[units] = values.t()
    else:
        weight[units] = values


def _by_unit(weight: Tensor, dim: int) -> Tensor:
    """View several matrices as [matrices, units, elements of a unit]."""
    return weight.transpose(1, 1 + dim)


def _places(weight: Tensor, units: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The matrix of each unit, and its number there."""
    size = weight.shape[1 + dim]
    return units // size, units % size


def _overlaps(weight: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape))


def with_effective_weight(
    weight: Tensor,  # [O, I] or [matrices, O, I], the same bits afterwards
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    units: Units,
    dim: int,
    dtype: torch.dtype,
    product: Callable[
        [Tensor], Tensor
    ],  # its argument, of the weight's shape, has dtype `dtype` and is valid during the call only
) -> Tensor:
    """Return product(W), where W is the weight with delta added to its units.

    The product must make its other operand contiguous. For a view with gaps PyTorch computes a batched product, and
    copies a frozen weight once for every row of the batch.
    """
    if weight.dtype != dtype or _overlaps(weight):
        return product(_effective_copy(weight, delta, units, dim, dtype))
    memory = weight.data  # shares the memory but not the version counter: to autograd the weight is unchanged
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
        except BaseException:  # an interrupt may have stopped the call above before the base was back
            finish_interrupted()
            raise


def call_on_effective(
    function: Callable[..., Tensor],
    arguments: tuple[Tensor | None, ...],
    weight: Tensor,  # [O, I], the same bits afterwards
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    units: Units,
    dim: int,
) -> Tensor | None:
    """Return function(*arguments) while base + delta is in the weight, which is one of the arguments.

    This is what a compiled op does, in less time of the host: no op is looked up, and no arguments are packed. It is
    for calls below autograd that :func:`s2ft.ops._library.runs_directly` allows.

    Args:
        function: A function of PyTorch that is not written in Python, such as torch.matmul: an interrupt of Python code
            would come while base + delta is in the weight.
        arguments: Its arguments.
        weight: Frozen weight, on the CPU.
        delta: Trained update.
        units: The units that it is added to.
        dim: 0 if the units are outputs, 1 if they are inputs.

    Returns:
        The result. None if only the op can run this call: without compiled kernels, for tensors with gaps, and for
        wrong arguments, about which the op raises.
    """
    if _module is None or not (delta.is_cpu and delta.is_contiguous()):
        return None
    if isinstance(units, int):
        start, index = units, 0
    elif (
        units.is_cpu
        and units.dtype is torch.int64
        and units.is_contiguous()
        and units.shape == delta.shape[dim : dim + 1]
    ):
        start, index = 0, units.data_ptr()
    else:
        return None
    try:
        outputs, inputs = weight.shape
        outer, inner = delta.shape
        rows, columns = weight.stride()
        if not (columns == 1 and rows >= inputs or rows == 1 and columns >= outputs):
            return None
        # fmt: off
        return _module.call_on_effective(
            function, arguments, weight.data_ptr(), _TYPES[weight.dtype], outputs, inputs, rows, columns,
            delta.data_ptr(), _TYPES[delta.dtype], outer, inner, dim, start, index,
        )
        # fmt: on
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError):
        return None


def exclusive(op: str, reference: Callable) -> Callable:
    """Wrap the reference of an op that writes to its first argument, so that no other op holds a weight meanwhile."""

    @wraps(reference)
    def run(weight: Tensor, *args) -> None:
        check_writable(op, weight)
        with LOCK, _StreamOrder(weight):
            finish_interrupted()
            reference(weight, *args)

    return run


class _StreamOrder:
    """Order the work enqueued inside this context after the work of all earlier such contexts on the weight's GPU.

    A stream that is being captured can't wait for work outside the graph. The caller must order the replays.
    """

    _last: dict[int, torch.cuda.Event] = {}  # by device

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
    """Return a copy of the effective weight in `dtype`, rounded to the weight's own dtype first."""
    with LOCK:
        finish_interrupted()
        copy = weight.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        base = _read(weight, units, delta.shape[dim], dim)
    _write(copy, units, effective_units(base, delta.detach()).to(dtype), dim)
    return copy
