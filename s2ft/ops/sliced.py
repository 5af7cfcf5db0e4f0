"""Linear layers whose only trainable weights are some units: sliced_linear and indexed_linear, one registered op.

The units are a contiguous slice (S²FT paper, section 3.3), or those in an index (layout ``indexed``). `units` is the
start of the slice or the index. The layers of an attached model have weights that hold base + delta already. They take
what is here for the gradient of the delta.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._library import autocast_input, below_autograd, define, own_output
from s2ft.ops.in_place import Slice, Units, check_index, write_slices_

ALIGNMENT = 16  # bytes
LEAST_PADDED = 128  # columns
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ---- the op --------------------------------------------------------------------------------------------------


def check(
    x: Tensor, weight: Tensor, delta: Tensor, index: Tensor | None, start: int, dim: int, bias: Tensor | None
) -> None:
    """Check the arguments of the op.

    Raises:
        ValueError: An argument is wrong. The message names it.
    """
    op = "sliced_linear" if index is None else "indexed_linear"
    if dim not in (0, 1):
        raise ValueError(f"{op}: dim must be 0 (outputs) or 1 (inputs), got {dim}")
    if weight.dim() != 2 or delta.dim() != 2:
        raise ValueError(
            f"{op}: weight and delta must be matrices, got shapes {tuple(weight.shape)} and {tuple(delta.shape)}"
        )
    if weight.dtype not in DTYPES or delta.dtype not in DTYPES:
        raise ValueError(
            f"{op}: weight and delta must be float32, float64, float16 or bfloat16, got {weight.dtype} and "
            f"{delta.dtype}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}")
    if delta.shape[1 - dim] != weight.shape[1 - dim]:
        raise ValueError(
            f"{op}: delta of shape {tuple(delta.shape)} does not fit dim {dim} of weight of shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    length, size = delta.shape[dim], weight.shape[dim]
    if index is not None:
        check_index(op, index, length, size)
    elif not 0 <= start <= start + length <= size:
        raise ValueError(f"{op}: slice {start}:{start + length} outside weight.shape[{dim}]={size}")


def effective_weight(
    weight: Tensor,  # [O, I]
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    units: Units,
    dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Copy a weight with delta added to its units, rounded to the weight's own dtype and then cast to `dtype`."""
    copy = weight.clone()
    base = weight.index_select(dim, units) if isinstance(units, Tensor) else weight.narrow(dim, units, delta.shape[dim])
    write_slices_([Slice(copy, base, delta.detach(), units, dim)])
    return copy.to(dtype)


def reference(x, weight, delta, index, start, dim, bias, kept):
    check(x, weight, delta, index, start, dim, bias)
    bias = None if bias is None else bias.to(x.dtype)
    # A view with gaps would be computed as a batched product, which copies a frozen weight once for every row.
    weight = effective_weight(weight, delta, start if index is None else index, dim, x.dtype)
    return own_output(F.linear(x.contiguous(), weight, bias))


def fake(x, weight, delta, index, start, dim, bias, kept):
    check(x, weight, delta, index, start, dim, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, delta, index, ctx.start, ctx.dim, bias, kept = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    if not ctx.needs_input_grad[2]:
        kept = None
    elif ctx.dim == 0:
        kept = x
    elif kept is None:
        raise ValueError(
            "kept, the selected columns of x, must be given when dim is 1 and delta needs a gradient: call the "
            "function in s2ft.ops, which makes it"
        )
    ctx.save_for_backward(kept, weight, delta, index)


def _backward(ctx, grad):
    kept, weight, delta, index = ctx.saved_tensors
    units = ctx.start if index is None else index
    of_x, of_delta, of_bias = (ctx.needs_input_grad[position] for position in (0, 2, 6))
    # The gradient of x is the product with the transpose, in which the units are on the other side.
    grad_x = _product(grad, weight.t(), delta.t(), units, 1 - ctx.dim) if of_x else None
    grad_delta = delta_gradient(grad, kept, delta, units, ctx.dim) if of_delta else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if of_bias else None
    return grad_x, None, grad_delta, None, None, None, grad_bias, None


# bias has no default in the schema: the dispatcher drops an argument that equals its default, and its gradient.
_op = define(
    "sliced_linear(Tensor x, Tensor weight, Tensor delta, Tensor? index, int start, int dim, Tensor? bias, "
    "Tensor? kept) -> Tensor",
    reference,
    fake,
    _setup_context,
    _backward,
)


def _product(x: Tensor, weight: Tensor, delta: Tensor, units: Units, dim: int, bias: Tensor | None = None) -> Tensor:
    """Call the op, which checks the arguments. The columns of x that its backward needs are copied before.

    Inside the op, autograd would not see that they depend on x, and second derivatives would miss a term.
    """
    index, start = (units, 0) if isinstance(units, Tensor) else (None, units)
    kept = None
    if dim == 1 and delta.requires_grad and torch.is_grad_enabled():
        check(x, weight, delta, index, start, dim, bias)  # before x is read
        kept = columns_to_keep(x, units, delta.shape[1])
    return below_autograd(_op, x, weight, delta, index, start, dim, bias, kept)


def sliced_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    start: int,
    dim: int,
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [..., O]
    """Compute ``x @ W.t() + bias``, where W is `weight` with `delta` added to the units start to start + n - 1.

    Each direction is one dense matrix product. base + delta is summed in the wider of the two dtypes and rounded once
    to the weight's dtype, so the result equals ``F.linear`` on the merged weight, bit for bit. Gradients of any order
    flow to x, delta and bias, never to weight. For dim 1, only the selected columns of x are saved for the backward
    (S²FT paper, section 3.3).

    The product multiplies by a copy of the weight. The layers of an attached model need none, because their weights
    hold base + delta.

    Args:
        x: Input, shape [..., I]. Under autocast it is cast to autocast's dtype.
        weight: Frozen weight, shape [O, I], float32, float64, bfloat16 or float16.
        delta: Trained update of n units, shape [n, I] if dim is 0, else [O, n]. Its dtype may be wider than the
            weight's.
        start: First unit of the slice.
        dim: 0 if the units are outputs (rows of the weight), 1 if they are inputs (columns).
        bias: Bias, shape [O]. Default: none.

    Returns:
        The output, shape [..., O], in the dtype of x, or in autocast's dtype.

    Raises:
        ValueError: A shape or `dim` is wrong, or the slice does not lie inside the weight.
        TypeError: x and weight differ in dtype outside autocast.

    Example:
        >>> weight, delta = torch.zeros(4, 3), torch.ones(2, 3, requires_grad=True)
        >>> y = s2ft.ops.sliced_linear(torch.ones(1, 3), weight, delta, start=1, dim=0)
        >>> y.tolist()
        [[0.0, 3.0, 3.0, 0.0]]
        >>> y.sum().backward()
        >>> delta.grad.shape
        torch.Size([2, 3])
    """
    return _product(autocast_input("sliced_linear", x, weight), weight, delta, start, dim, bias)


def indexed_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    index: Tensor,  # [n], int64, no index twice
    dim: int,
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [..., O]
    """Compute ``x @ W.t() + bias``, where W is `weight` with `delta` added to the units in `index`.

    The contract is that of :func:`s2ft.ops.sliced_linear`, for units that are not neighbours. An index outside the
    weight raises before anything is written. On CUDA the entries of an index are not checked, because the check would
    stall the device: the layers check their index once, when they are made.

    Args:
        x: Input, shape [..., I]. Under autocast it is cast to autocast's dtype.
        weight: Frozen weight, shape [O, I], float32, float64, bfloat16 or float16.
        delta: Trained update of n units, shape [n, I] if dim is 0, else [O, n]. Its dtype may be wider than the
            weight's.
        index: Selected units, shape [n], int64, without duplicates.
        dim: 0 if the units are outputs (rows of the weight), 1 if they are inputs (columns).
        bias: Bias, shape [O]. Default: none.

    Returns:
        The output, shape [..., O], in the dtype of x, or in autocast's dtype.

    Raises:
        ValueError: A shape or `dim` is wrong, or `index` has an entry outside the weight.
        TypeError: x and weight differ in dtype outside autocast.

    Example:
        >>> x, weight, delta = torch.ones(1, 4), torch.zeros(2, 4), torch.ones(2, 2)
        >>> s2ft.ops.indexed_linear(x, weight, delta, torch.tensor([3, 0]), dim=1)
        tensor([[2., 2.]])
    """
    return _product(autocast_input("indexed_linear", x, weight), weight, delta, index, dim, bias)


# ---- the gradient of the delta -------------------------------------------------------------------------------


def _can_widen(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch.mm can write float32 results. PyTorch has this for CUDA only, and without a derivative.

    A GPU sums in float32 and can write these sums, so that the gradient of a float32 delta on a half-precision weight
    is not rounded to half precision first. Elsewhere the result has the dtype of its operands, and autograd casts it.
    """
    return (
        x.is_cuda
        and dtype is torch.float32
        and x.dtype in (torch.bfloat16, torch.float16)
        and torch.version.hip is None
        and not torch.is_grad_enabled()
        and x.numel() > 0
    )


def _padding(x: Tensor, length: int) -> int:
    """The number of columns by which a matrix of `length` columns is extended, so that its rows are aligned.

    cuBLAS needs rows that start at multiples of 16 bytes for its fast kernels, which take a third of the time. Below
    128 columns nothing is added, because a backward would keep over 5 % more.
    """
    return 0 if length < LEAST_PADDED or not x.is_cuda else -length % (ALIGNMENT // x.element_size())


def _is_slow_operand(x: Tensor, start: int, length: int) -> bool:
    """Whether a product with columns of x is faster on a copy, because they or their rows are not aligned."""
    is_aligned = start * x.element_size() % ALIGNMENT == 0 or length < LEAST_PADDED or not x.is_cuda
    return not is_aligned or _padding(x, length) > 0


def columns_to_keep(x: Tensor, units: Units, length: int) -> Tensor:
    """Copy the selected columns of x, which are all that the backward needs of x for dim 1, with padding."""
    padding = _padding(x, length)
    if padding:
        return F.pad(_columns(x, units, length), (0, padding))
    if isinstance(units, Tensor):
        return _columns(x, units, length).contiguous()  # it is a copy already
    if not torch.is_grad_enabled() and x.is_contiguous():
        return torch.narrow_copy(x, -1, units, length)  # the copy below in a third of the time, without a derivative
    return _columns(x, units, length).clone(memory_format=torch.contiguous_format)


def _columns(x: Tensor, units: Units, length: int) -> Tensor:
    """The entries of the units along the last dimension: x [..., size] → [..., length]."""
    return x.index_select(-1, units) if isinstance(units, Tensor) else x.narrow(-1, units, length)


def delta_gradient(grad: Tensor, kept: Tensor, delta: Tensor, units: Units, dim: int, plain: bool = False) -> Tensor:
    """The gradient of delta. If `plain`, autograd casts it to the dtype of delta, in less time of the host.

    Args:
        grad: Gradient of the output, [..., O].
        kept: All of x for dim 0, and its selected columns for dim 1, which may be padded.
        delta: The trained update.
        units: Its units.
        dim: 0 if they are outputs, 1 if they are inputs.
        plain: Whether gradients are not recorded and :func:`runs_directly` allows the call.

    Returns:
        The sum of grad ⊗ kept over all leading dimensions, in the shape of delta.
    """
    length = delta.shape[dim]
    if dim == 0 and isinstance(units, int) and not _is_slow_operand(grad, units, length):
        start, width = units, length
    else:
        if dim == 0:
            grad = columns_to_keep(grad, units, length)
        start, width = 0, grad.shape[-1]
    if kept.dim() != 2:
        kept = kept.reshape(-1, kept.shape[-1])
    options: dict[str, Any] = {"out_dtype": delta.dtype} if _can_widen(kept, delta.dtype) else {}
    gradient = torch.mm(_transposed(grad, start, width, plain), kept, **options)
    if gradient.shape[dim] != length:
        gradient = gradient.narrow(dim, 0, length)
    return gradient if plain or gradient.dtype is delta.dtype else gradient.to(delta.dtype)


def _transposed(grad: Tensor, start: int, width: int, plain: bool) -> Tensor:
    """Columns of grad as rows: grad [..., O] → [width, rows]."""
    size = grad.shape[-1]
    if width == size and grad.dim() == 2:
        return grad.t()
    if plain and grad.is_contiguous() and grad.numel() > 0:  # one view instead of two or three takes up to 10 µs less
        return torch.as_strided(grad, (width, grad.numel() // size), (1, size), grad.storage_offset() + start)
    return grad.reshape(-1, size).narrow(1, start, width).t()
