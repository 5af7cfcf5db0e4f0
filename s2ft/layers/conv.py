"""Convolutions that train a few output or input channels of a frozen weight."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2ft.layers.base import S2Layer
from s2ft.ops import indexed_conv

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class S2Conv(S2Layer):
    """What S2ColumnConv and S2RowConv share: the forward is the convolution's on the effective weight.

    `s2` is [n, I, taps] or [O, n, taps], taps being all positions of the kernel.
    """

    def _take_over(self, module: nn.Module) -> None:
        self.in_channels, self.out_channels, self.kernel_size = module.in_channels, module.out_channels, module.kernel_size
        self.stride, self.dilation, self.padding_mode = module.stride, module.dilation, module.padding_mode
        # PyTorch pads beforehand where the sides differ (padding="same") or are not filled with zeros
        self.before = None
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            self.before = list(module._reversed_padding_repeated_twice)
        self.padding = (0,) * len(module.stride) if self.before is not None else module.padding

    def forward(self, input: Tensor) -> Tensor:
        """input [N, in_channels, ...] or without N → [N, out_channels, ...]."""
        batched = input.dim() == self.weight.dim()
        x = input if batched else input.unsqueeze(0)
        if self.before is not None:
            x = F.pad(x, self.before, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        y = self._convolve(x)
        return y if batched else y.squeeze(0)

    def _convolve(self, x: Tensor) -> Tensor:
        if self.fused:
            self._check_fused()
        if self.fused or not self.enabled:
            return torch.convolution(x, self.weight, self.bias, self.stride, self.padding, self.dilation, False,
                                     [0] * len(self.stride), 1)
        index = self.index
        if index is None:
            index = torch.arange(self.start, self.end, device=self.weight.device)
        return indexed_conv(x, self.weight, self.s2, index, self.dim, self.bias, self.stride, self.padding,
                            self.dilation)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {self._selected()}"


class S2ColumnConv(S2Conv):
    """Convolution that trains output channels."""

    dim = 0


class S2RowConv(S2Conv):
    """Convolution that trains input channels. For the backward it keeps those channels of its input, not the input."""

    dim = 1
