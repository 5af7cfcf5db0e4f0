"""Linear layer whose only trainable weights are a contiguous slice (paper, section 3.3)."""
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._effective import effective_weight
from s2ft.ops._library import autocast_input, check_linear, define


def reference(x: Tensor, weight: Tensor, delta: Tensor, start: int, dim: int,
              bias: Optional[Tensor] = None) -> Tensor:
    with torch.no_grad(), effective_weight(weight, delta, start, dim, x.dtype) as effective:
        return F.linear(x.contiguous(), effective, None if bias is None else bias.to(x.dtype))


def reference_grad_x(grad: Tensor, weight: Tensor, delta: Tensor, start: int, dim: int) -> Tensor:
    with torch.no_grad(), effective_weight(weight, delta, start, dim, grad.dtype) as effective:
        return grad.contiguous() @ effective


def fake(x, weight, delta, start, dim, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fake_grad_x(grad, weight, delta, start, dim):
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def setup_context(ctx, inputs, output):
    x, weight, delta, start, dim, bias = inputs
    ctx.start, ctx.length, ctx.dim = start, delta.shape[dim], dim
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept = None
    if ctx.needs_input_grad[2]:   # a view of the inputs' slice would keep all of x alive, so copy it
        kept = x if dim == 0 else x.narrow(-1, start, ctx.length).clone(memory_format=torch.contiguous_format)
    ctx.save_for_backward(kept, weight, delta)


def backward(ctx, grad):
    kept, weight, delta = ctx.saved_tensors
    grad_x = grad_delta = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.s2ft.sliced_linear_grad_x(grad, weight, delta, ctx.start, ctx.dim)
    if ctx.needs_input_grad[2]:
        outputs = grad.narrow(-1, ctx.start, ctx.length) if ctx.dim == 0 else grad
        grad_delta = outer_product(outputs, kept).to(delta.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, grad_delta, None, None, grad_bias


def outer_product(grad: Tensor,   # [..., a]
                  x: Tensor       # [..., b]
                  ) -> Tensor:    # [a, b]
    """The weight gradient: sum over all leading dimensions of grad ⊗ x."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


# bias has no default here: the dispatcher drops arguments that equal it, gradients and all
_op = define("sliced_linear(Tensor x, Tensor weight, Tensor delta, int start, int dim, Tensor? bias) -> Tensor",
             reference, fake, setup_context, backward)
_grad_x = define("sliced_linear_grad_x(Tensor grad, Tensor weight, Tensor delta, int start, int dim) -> Tensor",
                 reference_grad_x, fake_grad_x)


def sliced_linear(x: Tensor,        # [..., I]
                  weight: Tensor,   # [O, I], frozen
                  delta: Tensor,    # [n, I] if dim == 0 else [O, n]
                  start: int, dim: int,
                  bias: Optional[Tensor] = None   # [O]
                  ) -> Tensor:      # [..., O]
    """y = x @ Wᵀ + bias, with W = weight and ``W.narrow(dim, start, n) += delta``.

    One dense GEMM each way. base + delta is summed in the wider of the two dtypes and rounded once
    to the weight's, so the numbers are those of ``F.linear`` on the merged weight, bit for bit.
    Gradients flow to x, delta and bias, never to weight; for dim 1 only x's slice is kept for them.
    The weight is written to during the call and is bit-identical after it: calls on the CPU lock each
    other out, CUDA calls on one weight must share a stream.

    Dtypes: float32, float64, bfloat16, float16; delta may be wider than weight. Under autocast x and
    the result have autocast's dtype and weight keeps its own.
    Raises: ValueError for a wrong shape, dim, or a slice that leaves weight; TypeError for mixed x and
    weight dtypes outside autocast.
    """
    check_linear("sliced_linear", x, weight, delta, dim, bias)
    stop = start + delta.shape[dim]
    if not 0 <= start <= stop <= weight.shape[dim]:
        raise ValueError(f"sliced_linear: slice {start}:{stop} outside weight.shape[{dim}]={weight.shape[dim]}")
    return _op(autocast_input("sliced_linear", x, weight), weight, delta, start, dim, bias)
