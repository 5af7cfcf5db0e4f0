"""What a layer computes with if its weight has to fit into a quantized file: the nearest values that the file can hold.

The gradient of the slice is that of the values which are multiplied (straight-through).
"""

import torch
from torch import Tensor

from s2ft.codecs.codec import Blocks, Codec


class CodedSlice:
    """Units of a weight as a quantized file has them."""

    def __init__(self, codec: Codec, blocks: Blocks, positions: Tensor, dim: int) -> None:
        """Keep the codes of some units.

        Args:
            codec: The codec of the weight.
            blocks: Its units in ascending order.
            positions: Where each of them is in s2, [n] int64.
            dim: Dimension of the units.
        """
        self.codec, self.blocks, self.positions, self.dim = codec, blocks, positions, dim
        self.base = codec.values(blocks).float()

    def __call__(self, s2: Tensor) -> Tensor:
        """The values of the units nearest to base + s2, in the order of s2, float32. Gradients flow to s2 unchanged."""
        if self.base.device != s2.device:
            self._to(s2.device)
        with torch.no_grad():
            wanted = self.base + s2.index_select(self.dim, self.positions).float()
            coded = self.codec.values(self.codec.nearest(wanted, self.blocks)).float()
            coded = torch.where(wanted.isfinite(), coded, wanted)  # so that a loss of NaN is seen
            coded = torch.empty_like(coded).index_copy_(self.dim, self.positions, coded)
        return coded + (s2 - s2.detach()) if s2.requires_grad and torch.is_grad_enabled() else coded

    def _to(self, device: torch.device) -> None:
        codes, scales = self.blocks
        self.blocks = Blocks(codes.to(device), tuple(scale.to(device) for scale in scales))
        self.positions, self.base = self.positions.to(device), self.base.to(device)
