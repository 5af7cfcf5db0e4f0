"""Convolutions that train a few output or input channels of a frozen weight."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.layers.base import S2Layer
from s2ft.layers.linear import Kind, product
from s2ft.ops._library import autocast_input, own_output


def conv_forward(
    module: Any,  # nn.Conv1d to Conv3d of one group, or S2Conv
    x: Tensor,  # [N, in_channels, ...] or without N
    run: Callable[[Tensor, list], Tensor],  # of x with N, padded where it needs it, and the geometry that is left
) -> Tensor:  # [N, out_channels, ...]
    """Run a convolution, with or without a dimension for the batch."""
    batched = x.dim() == module.weight.dim()
    x, padding = _padded(module, x if batched else x.unsqueeze(0))
    y = run(x, [list(module.stride), list(padding), list(module.dilation)])
    return y if batched else y.squeeze(0)


def _padded(module: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pad x where PyTorch pads before the convolution: with sides that differ (padding="same") or no zeros.

    Returns:
        x and the padding that the convolution still has to do.
    """
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, list(module._reversed_padding_repeated_twice), mode=mode), (0,) * len(module.stride)


def _gradients(which: int, grad, x, weight, stride, padding, dilation) -> Tensor:
    """Return the gradient of a convolution with respect to x (which = 0) or weight (which = 1).

    Of the one that is asked for, only the shape is used. x and weight may have some of the inputs and outputs only.
    """
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), 1, [which == 0, which == 1, False]
    )[which]


class S2Conv(S2Layer):
    """What S2ColumnConv and S2RowConv share: the forward is that of the convolution on the effective weight.

    `s2` is [n, in_channels, taps] or [out_channels, n, taps], where taps are all positions of the kernel.
    """

    def _copy_settings(self, module: nn.Module) -> None:
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "padding_mode",
            "_reversed_padding_repeated_twice",
        ):
            setattr(self, name, getattr(module, name))

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer: input [N, in_channels, ...] → output [N, out_channels, ...]; N may be missing."""
        return conv_forward(
            self,
            input,
            partial(product, self)
            if self.enabled
            else lambda x, call: self.kind.run(
                autocast_input("this layer", x, self.weight), self.weight, self.bias, call
            ),
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {super().extra_repr()}"


class S2ColumnConv(S2Conv):
    """Convolution that trains output channels."""

    dim = 0


class S2RowConv(S2Conv):
    """Convolution that trains input channels. For the backward it keeps only those channels of its input."""

    dim = 1


class ConvolutionKind(Kind):
    """Convolutions of one group, over one to three dimensions."""

    name = "nn.Conv1d to Conv3d of one group"
    layers = (S2ColumnConv, S2RowConv)

    def matches(self, found: Any) -> bool:
        return type(found) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and found.groups == 1

    def run_with_delta(self, module: Any, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        weight = self.with_delta(module.weight, delta, index, dim)
        x = autocast_input(self.name, x, weight)
        return conv_forward(module, x, lambda x, call: self.run(x, weight, module.bias, call))

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, call: Any) -> Tensor:
        bias, zero = None if bias is None else bias.to(x.dtype), [0] * len(call[0])
        return own_output(torch.ops.aten.convolution(x, weight.to(x.dtype), bias, *call, False, zero, 1))

    def keep(self, layer: Any, x: Tensor, call: Any) -> Tensor:
        return x if layer.dim == 0 else x.index_select(1, layer.selected_units())

    def grad_of_x(self, grad: Tensor, weight: Tensor, shape: torch.Size, call: Any) -> Tensor:
        return _gradients(0, grad, grad.new_empty(1).expand(shape), weight.to(grad.dtype), *call)

    def grad_of_s2(self, layer: Any, grad: Tensor, kept: Tensor, s2: Tensor, call: Any, plain: bool) -> Tensor:
        outputs = grad.index_select(1, layer.selected_units()) if layer.dim == 0 else grad
        weight = grad.new_empty(1).expand(*s2.shape[:2], *layer.weight.shape[2:])
        return _gradients(1, outputs, kept, weight, *call).to(s2.dtype).reshape(s2.shape)

    def grad_of_bias(self, grad: Tensor) -> Tensor:
        return grad.transpose(0, 1).flatten(1).sum(1)

    def features_last(self, module: Any, x: Tensor) -> Tensor:
        return x.movedim(1 if x.dim() == module.weight.dim() else 0, -1)  # [N, channels, ...] or [channels, ...]


CONVOLUTION = ConvolutionKind()
S2Conv.kinds = (CONVOLUTION,)
