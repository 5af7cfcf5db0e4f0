"""The product of a trainable layer: a plain one on its weight, which holds base + s2, with the gradient of the slice.

The kind of the layer gives the formulas, see :class:`s2ft.layers.kind.Kind`. Numbers are those of the merged model, bit
for bit, because the same functions see the same operands. Only what the gradient of the slice needs is kept of x (S²FT
paper, section 3.3).
"""

from typing import Any

import torch
from torch import Tensor

from s2ft.ops._library import is_dynamo_compiling, runs_directly, transforms_active


def product(layer: Any, x: Tensor, call: Any = None) -> Tensor:
    """Run a trainable layer (S2Layer) on its weight, whose slice is written first if s2 has changed.

    Args:
        layer: The layer.
        x: Its input, in the dtype of the product.
        call: What else the formulas of its kind need to know of this call.

    Returns:
        The output. Gradients of any order flow to x, s2 and the bias.
    """
    weight, bias, s2 = layer.tensors()
    # torch.func can't look into the function below, and an exported program has no layers that write their slices.
    if transforms_active() or torch.compiler.is_exporting():
        return layer.kind.run(x, layer.effective_weight(s2, weight), bias, call)
    trains = s2.requires_grad or x.requires_grad or bias is not None and bias.requires_grad
    trains = trains and torch.is_grad_enabled()
    is_held = _check_held(s2, trains) if is_dynamo_compiling() else layer.hold(weight, s2)
    if not trains:
        return layer.kind.run(x, _multiplied(layer, weight, s2, is_held), bias, call)
    outputs = _Product.apply(layer, x, weight, s2, bias, call, is_held)
    return outputs[0] if type(outputs) is tuple else outputs


class _Product(torch.autograd.Function):
    """The product. A copy that is kept of x is a second output of the node: second derivatives reach x through it."""

    @staticmethod
    def forward(ctx, layer, x, weight, s2, bias, call, is_held):
        ctx.set_materialize_grads(False)
        kind = ctx.kind = layer.kind
        y = kind.run(x, _multiplied(layer, weight, s2, is_held), bias, call)
        kept = kind.keep(layer, x, call) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(weight, s2, kept)
        ctx.layer, ctx.shape, ctx.call, ctx.bias_dtype = layer, x.shape, call, None if bias is None else bias.dtype
        # A compiled graph has no second derivatives.
        return (y, kept) if kept is not None and layer.dim == 1 and not is_dynamo_compiling() else y

    @staticmethod
    def backward(ctx, grad, grad_kept=None):
        _, of_x, _, of_s2, of_bias, *_ = ctx.needs_input_grad
        (weight, s2, kept), layer, kind = ctx.saved_tensors, ctx.layer, ctx.kind
        grad_x = grad_s2 = grad_bias = None
        if grad is not None:
            records = torch.is_grad_enabled()
            if of_x:
                # The base may be back in the weight, inside disable_adapters. A second derivative has to see that the
                # weight depends on s2.
                is_held = _check_held(s2, True) if is_dynamo_compiling() else not records and layer.is_held(weight, s2)
                multiplied = weight if is_held else layer.effective_weight(s2, weight)
                grad_x = kind.grad_of_x(grad, multiplied, ctx.shape, ctx.call)
            if of_s2:
                if not is_dynamo_compiling():  # the forward of a graph has said so
                    layer.expect_change()
                plain = not records and runs_directly(grad, s2)
                grad_s2 = kind.grad_of_s2(layer, grad, kept, s2, ctx.call, plain)
            if of_bias:
                grad_bias = kind.grad_of_bias(grad).to(ctx.bias_dtype)
        if grad_kept is not None and of_x:
            through_kept = _through_copy(layer, grad_kept, ctx.shape, ctx.call)
            grad_x = through_kept if grad_x is None else grad_x + through_kept
        return None, grad_x, None, grad_s2, grad_bias, None, None


def _check_held(s2: Tensor, trains: bool) -> bool:
    """True. A compiled function can't compare versions itself, so the check is an op of its graph, which may raise."""
    torch.ops.s2ft.check_held(s2, trains)
    return True


def _multiplied(layer: Any, weight: Tensor, s2: Tensor, is_held: bool) -> Tensor:
    """The effective weight in a forward: the layer's own, or a copy if it does not hold base + s2."""
    return weight if is_held else layer.effective_weight(s2, weight).detach()


def _through_copy(layer: Any, grad: Tensor, shape: torch.Size, call: Any) -> Tensor:
    """The part of the gradient of x that comes through the copy of its units, which is linear in x."""
    with torch.enable_grad():
        x = grad.new_zeros(shape, requires_grad=True)
        return torch.autograd.grad(layer.kind.keep(layer, x, call), x, grad, create_graph=True)[0]
