"""Linear layer whose only trainable weights are scattered rows or columns (layout ``indexed``)."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._effective import effective_weight
from s2ft.ops._library import autocast_input, check_index, check_linear, define
from s2ft.ops.sliced_linear import outer_product


def reference(x: Tensor, weight: Tensor, delta: Tensor, index: Tensor, dim: int,
              bias: Optional[Tensor] = None) -> Tensor:
    with torch.no_grad(), effective_weight(weight, delta, index, dim, x.dtype) as effective:
        return F.linear(x.contiguous(), effective, None if bias is None else bias.to(x.dtype))


def reference_grad_x(grad: Tensor, weight: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
    with torch.no_grad(), effective_weight(weight, delta, index, dim, grad.dtype) as effective:
        return grad.contiguous() @ effective


def fake(x, weight, delta, index, dim, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fake_grad_x(grad, weight, delta, index, dim):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def setup_context(ctx, inputs, output):
    x, weight, delta, index, dim, bias = inputs
    ctx.dim = dim
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept = None
    if ctx.needs_input_grad[2]:
        kept = x if dim == 0 else x.index_select(-1, index)
    ctx.save_for_backward(kept, weight, delta, index)


def backward(ctx, grad):
    kept, weight, delta, index = ctx.saved_tensors
    grad_x = grad_delta = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.s2ft.indexed_linear_grad_x(grad, weight, delta, index, ctx.dim)
    if ctx.needs_input_grad[2]:
        outputs = grad.index_select(-1, index) if ctx.dim == 0 else grad
        grad_delta = outer_product(outputs, kept).to(delta.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_delta, None, None, grad_bias


# bias has no default here: the dispatcher drops arguments that equal it, gradients and all
_op = define("indexed_linear(Tensor x, Tensor weight, Tensor delta, Tensor index, int dim, Tensor? bias) -> Tensor",
             reference, fake, setup_context, backward)
_grad_x = define("indexed_linear_grad_x(Tensor grad, Tensor weight, Tensor delta, Tensor index, int dim) -> Tensor",
                 reference_grad_x, fake_grad_x)


def indexed_linear(x: Tensor,        # [..., I]
                   weight: Tensor,   # [O, I], frozen
                   delta: Tensor,    # [n, I] if dim == 0 else [O, n]
                   index: Tensor,    # [n], int64, no index twice
                   dim: int,
                   bias: Optional[Tensor] = None   # [O]
                   ) -> Tensor:      # [..., O]
    """y = x @ Wᵀ + bias, with W = weight and ``W.index_select(dim, index) += delta``.

    The same contract as :func:`s2ft.ops.sliced_linear`, for units that lie anywhere. An index outside
    the weight raises before anything is written (on CUDA, where looking would stall the device, the
    layers check it once when they are made).
    """
    check_linear("indexed_linear", x, weight, delta, dim, bias)
    check_index("indexed_linear", index, delta.shape[dim], weight.shape[dim])
    return _op(autocast_input("indexed_linear", x, weight), weight, delta, index, dim, bias)
