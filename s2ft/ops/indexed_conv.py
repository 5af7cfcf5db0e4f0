"""Convolution whose only trainable weights are those of a few output or input channels.

There is no compiled kernel: the product is PyTorch's convolution on a copy of the weight that holds base + delta in the
selected channels. A convolution's weight is small compared with its activations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2ft.ops._effective import effective_units
from s2ft.ops._library import autocast_input, check_index, define, own_output
from s2ft.ops._lock import LOCK


def effective(weight: Tensor, delta: Tensor, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return a copy of the weight in `dtype`, with delta added to its channels and rounded to the weight's dtype."""
    with LOCK:
        copy = weight.detach().clone()
    units = copy.index_select(dim, index)
    copy.index_copy_(dim, index, effective_units(units, delta.detach().reshape(units.shape)))
    return copy.to(dtype)


def differentiable(weight: Tensor, delta: Tensor, index: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the same as :func:`effective`, computed by functions that pass gradients to delta."""
    taps = weight.detach().flatten(2)
    wide = taps.to(torch.promote_types(weight.dtype, delta.dtype))
    return wide.index_add(dim, index, delta.to(wide.dtype)).to(weight.dtype).view(weight.shape).to(dtype)


def reference(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    index: Tensor,
    dim: int,
    bias: Tensor | None,
    kept: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    bias = None if bias is None else bias.detach().to(x.dtype)
    weight, zero = effective(weight, delta, index, dim, x.dtype), [0] * len(stride)
    return own_output(torch.ops.aten.convolution(x.detach(), weight, bias, stride, padding, dilation, False, zero, 1))


def reference_grad_x(
    grad: Tensor,
    weight: Tensor,
    delta: Tensor,
    index: Tensor,
    dim: int,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    weight = effective(weight, delta, index, dim, grad.dtype)
    return gradient_of_input(grad, weight, size, stride, padding, dilation)


def gradient_of_input(
    grad: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Return the gradient of the input of shape `size` of a plain convolution with `weight`."""
    return _gradients(grad, grad.new_empty(1).expand(size), weight, stride, padding, dilation, 0)


def reference_grad_delta(
    grad: Tensor, x: Tensor, shape: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    return _gradients(grad, x, grad.new_empty(1).expand(shape), stride, padding, dilation, 1)


def _gradients(grad, x, weight, stride, padding, dilation, which: int) -> Tensor:
    """Return the gradient of a convolution with respect to x (which = 0) or weight (which = 1)."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), 1, [which == 0, which == 1, False]
    )[which]


def fake(x, weight, delta, index, dim, bias, kept, stride, padding, dilation):
    return torch.ops.aten.convolution(
        x, weight.to(x.dtype), None, stride, padding, dilation, False, [0] * len(stride), 1
    )


def fake_grad_x(grad, weight, delta, index, dim, size, stride, padding, dilation):
    return grad.new_empty(size)


def fake_grad_delta(grad, x, shape, stride, padding, dilation):
    return grad.new_empty(shape)


def setup_context(ctx, inputs, output):
    x, weight, delta, index, dim, bias, kept, stride, padding, dilation = inputs
    ctx.dim, ctx.geometry, ctx.size = dim, (stride, padding, dilation), list(x.shape)
    ctx.bias_dtype = None if bias is None else bias.dtype
    kept = (x if dim == 0 else kept) if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept, weight, delta, index)


def backward(ctx, grad):
    kept, weight, delta, index = ctx.saved_tensors
    grad_x = grad_delta = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grad_x_of(grad, weight, delta, index, ctx.dim, ctx.size, *ctx.geometry)
    if ctx.needs_input_grad[2]:
        outputs = grad.index_select(1, index) if ctx.dim == 0 else grad
        shape = [*delta.shape[:2], *weight.shape[2:]]
        grad_delta = _grad_delta_of(outputs, kept, shape, *ctx.geometry)
        grad_delta = grad_delta.to(delta.dtype).reshape(delta.shape)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.transpose(0, 1).flatten(1).sum(1).to(ctx.bias_dtype)
    return grad_x, None, grad_delta, None, None, grad_bias, None, None, None, None


def _grad_x_of(grad, weight, delta, index, dim, size, *geometry):
    if torch.is_grad_enabled():  # create_graph: autograd can differentiate PyTorch's own gradient
        weight = differentiable(weight, delta, index, dim, grad.dtype)
        return gradient_of_input(grad, weight, size, *geometry)
    return torch.ops.s2ft.indexed_conv_grad_x(grad, weight, delta, index, dim, size, *geometry)


def _grad_delta_of(grad, kept, shape, *geometry):
    gradient = reference_grad_delta if torch.is_grad_enabled() else torch.ops.s2ft.indexed_conv_grad_delta
    return gradient(grad, kept, shape, *geometry)


_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
_op = define(
    "indexed_conv(Tensor x, Tensor weight, Tensor delta, Tensor index, int dim, Tensor? bias, Tensor? kept, "
    f"{_GEOMETRY}) -> Tensor",
    reference,
    fake,
    setup_context,
    backward,
)
_grad_x = define(
    "indexed_conv_grad_x(Tensor grad, Tensor weight, Tensor delta, Tensor index, int dim, SymInt[] size, "
    f"{_GEOMETRY}) -> Tensor",
    reference_grad_x,
    fake_grad_x,
)
_grad_delta = define(
    f"indexed_conv_grad_delta(Tensor grad, Tensor x, SymInt[] shape, {_GEOMETRY}) -> Tensor",
    reference_grad_delta,
    fake_grad_delta,
)


def indexed_conv(
    x: Tensor,  # [N, I, ...], one to three further dimensions
    weight: Tensor,  # [O, I, ...], frozen
    delta: Tensor,  # [n, I, taps] if dim == 0 else [O, n, taps]; taps: all positions of the kernel
    index: Tensor,  # [n] int64, no channel twice
    dim: int,
    bias: Tensor | None = None,  # [O]
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
) -> Tensor:  # [N, O, ...]
    """Compute the convolution of x with W, where W is `weight` with `delta` added to the channels in `index`.

    base + delta is summed in the wider of the two dtypes and rounded once to the weight's dtype. Gradients of any order
    flow to x, delta and bias, never to weight. For dim 1, only the selected channels of x are saved for the backward.
    The convolution has one group.

    Args:
        x: Input, shape [N, I, ...] with one to three further dimensions.
        weight: Frozen weight, shape [O, I, ...], float32, float64, bfloat16 or float16.
        delta: Trained update of n channels, shape [n, I, taps] if dim is 0, else [O, n, taps], where taps is the number
            of positions of the kernel.
        index: Selected channels, shape [n], int64, without duplicates.
        dim: 0 if the channels are outputs, 1 if they are inputs.
        bias: Bias, shape [O]. Default: none.
        stride: Stride, one entry per further dimension or one for all. Default: 1.
        padding: Padding on both sides, likewise. Default: 0.
        dilation: Distance of the kernel's positions, likewise. Default: 1.

    Returns:
        The output, shape [N, O, ...], in the dtype of x, or in autocast's dtype.

    Raises:
        ValueError: A shape, `dim` or `index` is wrong.
        TypeError: x and weight differ in dtype outside autocast.

    Example:
        >>> x, weight, delta = torch.ones(1, 2, 5), torch.zeros(4, 2, 3), torch.ones(1, 2, 3)
        >>> y = s2ft.ops.indexed_conv(x, weight, delta, torch.tensor([1]), dim=0, padding=[1])
        >>> y[0, 1]
        tensor([4., 6., 6., 6., 4.])
    """
    spatial = weight.dim() - 2
    if spatial not in (1, 2, 3) or x.dim() != weight.dim() or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"indexed_conv: x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}"
        )
    if dim not in (0, 1):
        raise ValueError(f"indexed_conv: dim must be 0 (outputs) or 1 (inputs), got {dim}")
    expected = [*weight.shape[:2], weight[0, 0].numel()]
    expected[dim] = index.numel()
    if list(delta.shape) != expected:
        raise ValueError(f"indexed_conv: delta must have shape {tuple(expected)}, got {tuple(delta.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"indexed_conv: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    check_index("indexed_conv", index, delta.shape[dim], weight.shape[dim])
    geometry = [
        _entries(name, value, spatial)
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation))
    ]
    x, kept = autocast_input("indexed_conv", x, weight), None
    if dim == 1 and delta.requires_grad and torch.is_grad_enabled():
        kept = x.index_select(1, index)  # here and not in the op, so that autograd sees that it depends on x
    return _op(x, weight, delta, index, dim, bias, kept, *geometry)


def _entries(name: str, value: Sequence[int], spatial: int) -> tuple[int, ...]:
    value = tuple(value)
    if len(value) not in (1, spatial):
        raise ValueError(f"indexed_conv: {name} must have {spatial} entries or one, got {value}")
    return value * spatial if len(value) == 1 else value
