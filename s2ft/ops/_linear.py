"""The common part of sliced_linear and indexed_linear: checks, reference, shape function and gradients.

`units` is the start of a contiguous slice in sliced_linear, and the index of every unit in indexed_linear.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._effective import Units, effective_weight
from s2ft.ops._library import autocast_input, below_autograd, check_index, define, own_output

ALIGNMENT = 16  # bytes
LEAST_PADDED = 128  # columns


def check(op: str, x: Tensor, weight: Tensor, delta: Tensor, units: Units, dim: int, bias: Tensor | None) -> None:
    """Check the arguments of a linear op.

    Raises:
        ValueError: An argument is wrong. The message names it.
    """
    if dim not in (0, 1):
        raise ValueError(f"{op}: dim must be 0 (outputs) or 1 (inputs), got {dim}")
    if weight.dim() != 2 or delta.dim() != 2:
        raise ValueError(
            f"{op}: weight and delta must be matrices, got shapes {tuple(weight.shape)} and {tuple(delta.shape)}"
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
    if isinstance(units, Tensor):
        check_index(op, units, length, size)
    elif not 0 <= units <= units + length <= size:
        raise ValueError(f"{op}: slice {units}:{units + length} outside weight.shape[{dim}]={size}")


def reference(x, weight, delta, units, dim, bias, kept):
    # A view with gaps would be computed as a batched product, which copies a frozen weight once for every row.
    bias = None if bias is None else bias.to(x.dtype)
    return own_output(F.linear(x.contiguous(), effective_weight(weight, delta, units, dim, x.dtype), bias))


def reference_grad_x(grad, weight, delta, units, dim):
    return grad.contiguous() @ effective_weight(weight, delta, units, dim, grad.dtype)


def fake(x, weight, delta, units, dim, bias, kept):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fake_grad_x(grad, weight, delta, units, dim):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def define_linear(name: str, units: str) -> None:
    """Declare a linear op and the gradient of its x.

    Args:
        name: Name of the op.
        units: Type and name of the trained units in the schema.
    """

    def checked(function: Callable) -> Callable:
        def run(x, weight, delta, units, dim, bias, kept):
            check(name, x, weight, delta, units, dim, bias)
            return function(x, weight, delta, units, dim, bias, kept)

        return run

    # bias has no default in the schema: the dispatcher drops an argument that equals its default, and its gradient.
    op = define(
        f"{name}(Tensor x, Tensor weight, Tensor delta, {units}, int dim, Tensor? bias, Tensor? kept) -> Tensor",
        checked(reference),
        checked(fake),
        _keep_for_backward,
        lambda ctx, grad: _backward(grad_x_op, ctx, grad),
    )
    grad_x_op = define(
        f"{name}_grad_x(Tensor grad, Tensor weight, Tensor delta, {units}, int dim) -> Tensor",
        reference_grad_x,
        fake_grad_x,
        _keep_for_second_backward,
        partial(_second_backward, op),
    )


def call(name: str, x: Tensor, weight: Tensor, delta: Tensor, units: Units, dim: int, bias: Tensor | None) -> Tensor:
    """Call a linear op from its public function. The op checks the arguments."""
    x = autocast_input(name, x, weight)
    try:
        kept = _kept_if_trained(x, delta, units, dim)
    except (IndexError, RuntimeError):  # with wrong arguments, reading x may fail before the op can check them
        check(name, x, weight, delta, units, dim, bias)
        raise
    return getattr(torch.ops.s2ft, name)(x, weight, delta, units, dim, bias, kept)


def _outer_product(
    transposed: Tensor,  # [a, rows]
    x: Tensor,  # [rows, b]
    dtype: torch.dtype,
) -> Tensor:  # [a, b]
    """The product of a transposed gradient and x, in `dtype` where a kernel can write it.

    A GPU sums in float32 and can write these sums, so that the gradient of a float32 delta on a half-precision weight
    is not rounded to half precision first. Elsewhere the result has the dtype of its operands, and autograd casts it.
    """
    if _can_widen(x, dtype):
        return torch.mm(transposed, x, out_dtype=dtype)
    return torch.mm(transposed, x)


def _can_widen(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch.mm can write float32 results. PyTorch has this for CUDA only, and without a derivative."""
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
    if length < LEAST_PADDED or not x.is_cuda:
        return 0
    return -length % (ALIGNMENT // x.element_size())


def _is_slow_operand(x: Tensor, start: int, length: int) -> bool:
    """Whether a product with columns of x is faster on a copy, because they or their rows are not aligned."""
    is_aligned = start * x.element_size() % ALIGNMENT == 0 or length < LEAST_PADDED or not x.is_cuda
    return not is_aligned or _padding(x, length) > 0


def _kept_if_trained(x: Tensor, delta: Tensor, units: Units, dim: int) -> Tensor | None:
    """Copy the columns of x that the backward of the registered op needs.

    They are copied before the op and not inside it: there, autograd would not see that they depend on x, and second
    derivatives would miss a term.
    """
    if dim != 1 or not delta.requires_grad or not torch.is_grad_enabled():
        return None
    return columns_to_keep(x, units, delta.shape[1])


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
    gradient = _outer_product(_transposed(grad, start, width, plain), kept, delta.dtype)
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


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)


def _save(ctx, units: Units, *tensors: Tensor | None) -> None:
    if isinstance(units, Tensor):
        ctx.start = None
        ctx.save_for_backward(*tensors, units)
    else:
        ctx.start = units
        ctx.save_for_backward(*tensors)


def _saved(ctx) -> tuple[Tensor | int | None, ...]:
    return ctx.saved_tensors if ctx.start is None else (*ctx.saved_tensors, ctx.start)


def _keep_for_backward(ctx, inputs, output):
    x, weight, delta, units, dim, bias, kept = inputs
    ctx.dim, ctx.bias_dtype = dim, None if bias is None else bias.dtype
    if not ctx.needs_input_grad[2]:
        kept = None
    elif dim == 0:
        kept = x
    elif kept is None:
        raise ValueError(
            "kept, the selected columns of x, must be given when dim is 1 and delta needs a gradient: call the "
            "function in s2ft.ops, which makes it"
        )
    _save(ctx, units, kept, weight, delta)


def _backward(grad_x_op, ctx, grad):
    kept, weight, delta, units = _saved(ctx)
    of_x, of_delta, of_bias = (ctx.needs_input_grad[position] for position in (0, 2, 5))
    grad_x = below_autograd(grad_x_op, grad, weight, delta, units, ctx.dim) if of_x else None
    grad_delta = delta_gradient(grad, kept, delta, units, ctx.dim) if of_delta else None
    grad_bias = _bias_gradient(grad, ctx.bias_dtype) if of_bias else None
    return grad_x, None, grad_delta, None, None, grad_bias, None


def _keep_for_second_backward(ctx, inputs, output):
    grad, weight, delta, units, dim = inputs
    ctx.dim = dim
    _save(ctx, units, grad, weight, delta)


def _second_backward(op, ctx, second):  # [..., I], the gradient with respect to grad_x
    grad, weight, delta, units = _saved(ctx)
    grad_grad = grad_delta = None
    if ctx.needs_input_grad[0]:
        kept = _kept_if_trained(second, delta, units, ctx.dim)
        grad_grad = op(second, weight, delta, units, ctx.dim, None, kept)
    if ctx.needs_input_grad[2]:
        kept = second if ctx.dim == 0 else _columns(second, units, delta.shape[1])
        grad_delta = delta_gradient(grad, kept, delta, units, ctx.dim)
    return grad_grad, None, grad_delta, None, None
