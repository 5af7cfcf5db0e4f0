"""NF4 of bitsandbytes. A packed matrix is the tensors of one layer in a checkpoint, by their names behind `weight.`.

A scale for 64 weights (of another block size if the checkpoint says so) belongs to them alone, unless the scales are
quantized themselves: then they stay.
"""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

from s2ft.codecs.codec import Blocks, Codec, Scales, gather, spread
from s2ft.codecs.compressed import Packed

STATE = "quant_state.bitsandbytes__nf4"  # the tensor with the settings, as JSON


class Nf4(Codec):
    """NF4 as one checkpoint has it."""

    name = "NF4"

    def __init__(self, packed: Packed) -> None:
        """Read the settings of a packed matrix.

        Raises:
            ValueError: A block of weights has weights of two outputs.
        """
        self.state = json.loads(bytes(packed[STATE].tolist()))
        self.size, self.shape, self.dtype = (self.state[key] for key in ("blocksize", "shape", "dtype"))
        if self.shape[-1] % self.size:
            raise ValueError(f"NF4 needs outputs of whole blocks of {self.size} weights, got {self.shape[-1]} inputs")
        self.is_nested = "nested_absmax" in packed
        self.block = 1 if self.is_nested else self.size
        self.levels = packed["quant_map"].float()

    def unpack(self, packed: Packed) -> Blocks:
        codes = spread(packed["weight"].view(torch.uint8).flatten(), 4, 1)
        codes = codes.view(-1, 2).flip(-1).reshape(*self.shape[:-1], -1, self.size)  # the higher bits are first
        scale = packed["absmax"]
        if self.is_nested:
            outer = packed["nested_absmax"].repeat_interleave(self.state["nested_blocksize"])[: scale.numel()]
            scale = packed["nested_quant_map"][scale.int()] * outer + self.state["nested_offset"]
        return Blocks(codes, (scale.float().view(*codes.shape[:-1], 1),))

    def pack(self, blocks: Blocks, packed: Packed) -> Packed:
        codes = gather(blocks.codes.view(-1, 2).flip(-1).flatten(), 4, 1)
        made = {**packed, "weight": codes.view(packed["weight"].dtype).view(packed["weight"].shape)}
        return made if self.is_nested else {**made, "absmax": blocks.scales[0].flatten().to(packed["absmax"].dtype)}

    def scaled(self, levels: Tensor, scales: Scales) -> Tensor:
        return (levels * scales[0]).to(getattr(torch, self.dtype))

    def linear(self, scales: Scales) -> tuple[Tensor, Tensor | float]:
        return scales[0], 0.0

    def candidates(self, values: Tensor, scales: Scales) -> Iterator[Scales]:
        yield (values.abs().amax(-1, keepdim=True),)
