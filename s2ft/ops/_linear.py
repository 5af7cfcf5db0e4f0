"""What sliced_linear and indexed_linear share: reference, fake and gradients.

`units` is the start of a contiguous slice in the one, the index of every unit in the other.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._effective import Units, with_effective_weight
from s2ft.ops._library import define


def reference(x, weight, delta, units, dim, bias, kept):
    bias = None if bias is None else bias.to(x.dtype)
    return with_effective_weight(
        weight, delta, units, dim, x.dtype, lambda effective: F.linear(x.contiguous(), effective, bias)
    )


def reference_grad_x(grad, weight, delta, units, dim):
    return with_effective_weight(weight, delta, units, dim, grad.dtype, lambda effective: grad.contiguous() @ effective)


def fake(x, weight, delta, units, dim, bias, kept):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fake_grad_x(grad, weight, delta, units, dim):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def define_linear(name: str, units: str) -> Callable:
    """Declare a linear op and the gradient of its x.

    Args:
        name: the op's name.
        units: how the schema calls the trained units, with their type.

    Returns:
        The op's overload; call it by :func:`apply`.
    """
    # bias has no default here: the dispatcher drops arguments that equal it, gradients and all
    op = define(
        f"{name}(Tensor x, Tensor weight, Tensor delta, {units}, int dim, Tensor? bias, Tensor? kept) -> Tensor",
        reference,
        fake,
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


def apply(
    op: Callable, x: Tensor, weight: Tensor, delta: Tensor, units: Units, dim: int, bias: Tensor | None
) -> Tensor:
    """Call a linear op.

    For dim 1 the backward needs the units' share of x alone. It is copied here and not inside the op, where autograd
    would not see that it depends on x, and second derivatives would miss a term.
    """
    kept = None
    if dim == 1 and delta.requires_grad and torch.is_grad_enabled():
        kept = _share(x, units, delta.shape[1]).clone(memory_format=torch.contiguous_format)
    return op(x, weight, delta, units, dim, bias, kept)


def outer_product(
    grad: Tensor,  # [..., a]
    x: Tensor,  # [..., b]
) -> Tensor:  # [a, b]
    """The weight gradient: sum over all leading dimensions of grad ⊗ x."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _share(x: Tensor, units: Units, length: int) -> Tensor:
    """x [..., size] → [..., length], the entries of the units."""
    return x.index_select(-1, units) if isinstance(units, Tensor) else x.narrow(-1, units, length)


def _delta_gradient(grad: Tensor, kept: Tensor, delta: Tensor, units: Units, dim: int) -> Tensor:
    """kept: all of x for dim 0, the units' share of it for dim 1."""
    outputs = _share(grad, units, delta.shape[0]) if dim == 0 else grad
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
            "the units' share of x must be given where delta needs a gradient: call the function in s2ft.ops"
        )
    _save(ctx, units, kept, weight, delta)


def _backward(grad_x_op, ctx, grad):
    kept, weight, delta, units = _saved(ctx)
    grad_x = grad_delta = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _below_autograd(grad_x_op, grad, weight, delta, units, ctx.dim)
    if ctx.needs_input_grad[2]:
        grad_delta = _delta_gradient(grad, kept, delta, units, ctx.dim)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_delta, None, None, grad_bias, None


def _below_autograd(op: Callable, *args) -> Tensor:
    """op(*args); where nobody will differentiate it, without the 10 µs of an autograd function in Python."""
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
        grad_grad = apply(op, second, weight, delta, units, ctx.dim, None)
    if ctx.needs_input_grad[2]:
        kept = second if ctx.dim == 0 else _share(second, units, delta.shape[1])
        grad_delta = _delta_gradient(grad, kept, delta, units, ctx.dim)
    return grad_grad, None, grad_delta, None, None
