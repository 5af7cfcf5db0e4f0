"""Convolutions that train a few output or input channels of a frozen weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.layers.base import S2Layer
from s2ft.layers.held import Formulas, held_product
from s2ft.layers.kind import Kind
from s2ft.ops import indexed_conv
from s2ft.ops._library import autocast_input, own_output
from s2ft.ops.indexed_conv import differentiable, gradient_of_input, reference_grad_delta


def conv_forward(
    module: nn.Module,  # nn.Conv1d to Conv3d of one group, or S2Conv
    x: Tensor,  # [N, in_channels, ...] or without N
    delta: Tensor | None,  # [n, I, taps] if dim == 0 else [O, n, taps]; None: the weight as it is
    index: Tensor | None,  # [n] int64
    dim: int,
) -> Tensor:  # [N, out_channels, ...]
    """Run a convolution on its weight with a delta added to some channels."""
    batched = x.dim() == module.weight.dim()
    x, padding = _padded(module, x if batched else x.unsqueeze(0))
    geometry = module.stride, padding, module.dilation
    if delta is None:
        y = torch.convolution(x, module.weight, module.bias, *geometry, False, [0] * len(module.stride), 1)
    else:
        y = indexed_conv(x, module.weight, delta, index, dim, module.bias, *geometry)
    return y if batched else y.squeeze(0)


def _padded(module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pad x where PyTorch pads before the convolution: with sides that differ (padding="same") or no zeros.

    Returns:
        x and the padding that the convolution still has to do.
    """
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, list(module._reversed_padding_repeated_twice), mode=mode), (0,) * len(module.stride)


class S2Conv(S2Layer):
    """What S2ColumnConv and S2RowConv share: the forward is that of the convolution on the effective weight.

    `s2` is [n, in_channels, taps] or [out_channels, n, taps], where taps are all positions of the kernel.
    """

    @property
    def kind(self) -> Kind:
        return CONVOLUTION

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
        if self.effective == "step" and self.enabled:
            return self._held(input)
        if self.fused:
            self._check_fused()
        if self.fused or not self.enabled:
            return conv_forward(self, input, None, None, self.dim)
        index = self.index
        if index is None:
            index = torch.arange(self.start, self.end, device=self.weight.device)
        return conv_forward(self, input, self.delta, index, self.dim)

    def _held(self, x: Tensor) -> Tensor:
        batched = x.dim() == self.weight.dim()
        x, padding = _padded(self, x if batched else x.unsqueeze(0))
        x = autocast_input("effective='step'", x, self.weight)
        y = held_product(self, x, ConvFormulas(self, padding, x.shape))
        return y if batched else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self._selected()}"


class ConvFormulas(Formulas):
    """Formulas of a convolution: those of :mod:`s2ft.ops.indexed_conv`."""

    def __init__(self, layer: S2Conv, padding: tuple[int, ...], size: torch.Size) -> None:
        self.dim, self.index, self.size, self.shape = layer.dim, layer.index, list(size), layer.weight.shape
        if self.index is None:
            self.index = torch.arange(layer.start, layer.end, device=layer.weight.device)
        self.geometry = list(layer.stride), list(padding), list(layer.dilation)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias, zero = None if bias is None else bias.to(x.dtype), [0] * len(self.geometry[0])
        y = torch.ops.aten.convolution(x, weight.to(x.dtype), bias, *self.geometry, False, zero, 1)
        return own_output(y)

    def keep(self, x: Tensor, s2: Tensor) -> Tensor:
        return x if self.dim == 0 else x.index_select(1, self.index)

    def gradient_of_x(self, grad: Tensor, weight: Tensor) -> Tensor:
        return gradient_of_input(grad, weight.to(grad.dtype), self.size, *self.geometry)

    def gradient_of_s2(self, grad: Tensor, kept: Tensor, s2: Tensor) -> Tensor:
        outputs = grad.index_select(1, self.index) if self.dim == 0 else grad
        gradient = reference_grad_delta(outputs, kept, [*s2.shape[:2], *self.shape[2:]], *self.geometry)
        return gradient.to(s2.dtype).reshape(s2.shape)

    def gradient_of_bias(self, grad: Tensor) -> Tensor:
        return grad.transpose(0, 1).flatten(1).sum(1)

    def call_gradient_of_x(self, grad: Tensor, base: Tensor, s2: Tensor) -> Tensor:
        weight = differentiable(base, s2, self.index, self.dim, grad.dtype)
        return gradient_of_input(grad, weight, self.size, *self.geometry)


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

    def forward(self, module: nn.Module, x: Tensor, delta: Tensor, index: Tensor, dim: int) -> Tensor:
        return conv_forward(module, x, delta, index, dim)

    def features_last(self, module: nn.Module, x: Tensor) -> Tensor:
        return x.movedim(1 if x.dim() == module.weight.dim() else 0, -1)  # [N, channels, ...] or [channels, ...]


CONVOLUTION = ConvolutionKind()
