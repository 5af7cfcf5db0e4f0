"""Convolutions that train a few output or input channels of a frozen weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.layers.base import S2Layer
from s2ft.layers.kind import Kind
from s2ft.ops import indexed_conv


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
        if self.fused:
            self._check_fused()
        if self.fused or not self.enabled:
            return conv_forward(self, input, None, None, self.dim)
        index = self.index
        if index is None:
            index = torch.arange(self.start, self.end, device=self.weight.device)
        return conv_forward(self, input, self.delta, index, self.dim)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self._selected()}"


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
