"""The common part of sliced_linear and indexed_linear: checks, reference, shape function and gradients.

`units` is the start of a contiguous slice in sliced_linear, and the index of every unit in indexed_linear.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._effective import Units, with_effective_weight
from s2ft.ops._library import autocast_input, check_index, define, own_output


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
    bias = None if bias is None else bias.to(x.dtype)
    y = with_effective_weight(
        weight, delta, units, dim, x.dtype, lambda effective: F.linear(x.contiguous(), effective, bias)
    )
    return own_output(y)


def reference_grad_x(grad, weight, delta, units, dim):
    return with_effective_weight(weight, delta, units, dim, grad.dtype, lambda effective: grad.contiguous() @ effective)


def fake(x, weight, delta, units, dim, bias, kept):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fake_grad_x(grad, weight, delta, units, dim):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def define_linear(name: str, units: str) -> Callable:
    """Declare a linear op and the gradient of its x.

    Args:
        name: Name of the op.
        units: Type and name of the trained units in the schema.

    Returns:
        The overload of the op. Call it through :func:`call`.
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
    return op


def call(
    name: str, op: Callable, x: Tensor, weight: Tensor, delta: Tensor, units: Units, dim: int, bias: Tensor | None
) -> Tensor:
    """Call a linear op from its public function. The op checks the arguments."""
    x = autocast_input(name, x, weight)
    try:
        kept = _columns_to_keep(x, delta, units, dim)
    except (IndexError, RuntimeError):  # with wrong arguments, reading x may fail before the op can check them
        check(name, x, weight, delta, units, dim, bias)
        raise
    return op(x, weight, delta, units, dim, bias, kept)


def outer_product(
    grad: Tensor,  # [..., a]
    x: Tensor,  # [..., b]
) -> Tensor:  # [a, b]
    """The weight gradient: the sum of grad ⊗ x over all leading dimensions."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _columns_to_keep(x: Tensor, delta: Tensor, units: Units, dim: int) -> Tensor | None:
    """Return a copy of the selected columns of x, which is all that the backward needs of x for dim 1.

    They are copied before the op and not inside it: there, autograd would not see that they depend on x, and second
    derivatives would miss a term.
    """
    if dim != 1 or not delta.requires_grad or not torch.is_grad_enabled():
        return None
    return _columns(x, units, delta.shape[1]).clone(memory_format=torch.contiguous_format)


def _columns(x: Tensor, units: Units, length: int) -> Tensor:
    """The entries of the units along the last dimension: x [..., size] → [..., length]."""
    return x.index_select(-1, units) if isinstance(units, Tensor) else x.narrow(-1, units, length)


def _delta_gradient(grad: Tensor, kept: Tensor, delta: Tensor, units: Units, dim: int) -> Tensor:
    """The gradient of delta. `kept` is all of x for dim 0, and its selected columns for dim 1."""
    outputs = _columns(grad, units, delta.shape[0]) if dim == 0 else grad
    return outer_product(outputs, kept).to(delta.dtype)


def _save(ctx, units: Units, *tensors: Tensor | None) -> None:
    is_index = isinstance(units, Tensor)
    ctx.start = None if is_index else units
    ctx.save_for_backward(*tensors, units if is_index else None)


def _saved(ctx) -> tuple[Tensor | int | None, ...]:
    *tensors, index = ctx.saved_tensors
    return (*tensors, ctx.start if index is None else index)


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
    grad_x = grad_delta = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = below_autograd(grad_x_op, grad, weight, delta, units, ctx.dim)
    if ctx.needs_input_grad[2]:
        grad_delta = _delta_gradient(grad, kept, delta, units, ctx.dim)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_delta, None, None, grad_bias, None


def below_autograd(op: Callable, *args) -> Tensor:
    """Return op(*args), without the 10 µs of an autograd function in Python if gradients are off."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _keep_for_second_backward(ctx, inputs, output):
    grad, weight, delta, units, dim = inputs
    ctx.dim = dim
    _save(ctx, units, grad, weight, delta)


def _second_backward(op, ctx, second):  # [..., I], the gradient with respect to grad_x
    grad, weight, delta, units = _saved(ctx)
    grad_grad = grad_delta = None
    if ctx.needs_input_grad[0]:
        kept = _columns_to_keep(second, delta, units, ctx.dim)
        grad_grad = op(second, weight, delta, units, ctx.dim, None, kept)
    if ctx.needs_input_grad[2]:
        kept = second if ctx.dim == 0 else _columns(second, units, delta.shape[1])
        grad_delta = _delta_gradient(grad, kept, delta, units, ctx.dim)
    return grad_grad, None, grad_delta, None, None
