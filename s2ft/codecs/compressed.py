"""Codecs of compressed-tensors and bitsandbytes.

A scale for a group of inputs belongs to the group alone. One for an output, for a tile or for a whole weight does not,
and so do zero points, several of which share a number: they stay.

In NF4 a scale for 64 weights (of another block size if the checkpoint says so) belongs to them alone, unless the scales
are quantized themselves: then they stay.
"""

import json
from typing import Any

import torch
from torch import Tensor

from s2ft.codecs.codec import Blocks, Codec, Scales, gather, spread

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the numbers of 4 bits; those with the fourth bit are their negatives
FLOAT8 = torch.float8_e4m3fn
Packed = dict[str, Tensor]


class Float8(Codec):
    """FP8 with a scale for the weight, for each output, or for each tile."""

    name = "FP8"
    levels = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()

    def __init__(self, tile: tuple[int, int] | None = None) -> None:
        """Use a scale for each tile of outputs and inputs; default: one for the weight or for each output."""
        self.tile = tile

    def unpack(self, packed: Packed) -> Blocks:
        codes, scale = packed["weight"].view(torch.uint8), packed["weight_scale"]
        if self.tile is None:
            return Blocks(codes[:, None], (scale.reshape(-1, 1, 1),))
        for dim, (size, count) in enumerate(zip(self.tile, codes.shape)):
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, count)
        return Blocks(codes[..., None], (scale[..., None],))

    def pack(self, blocks: Blocks, packed: Packed) -> Packed:
        return {**packed, "weight": blocks.codes.flatten(-2).view(FLOAT8)}

    def scaled(self, levels: Tensor, scales: Scales) -> Tensor:
        return levels.to(scales[0].dtype) * scales[0]


class Nvfp4(Codec):
    """NVFP4: 4 bits, an FP8 scale for 16 inputs, and a scale for the weight, by which the others are divided."""

    name, block = "NVFP4", 16
    levels = torch.tensor([*E2M1, *(-one for one in E2M1)])

    def unpack(self, packed: Packed) -> Blocks:
        codes = spread(packed["weight_packed"], 4, 1).unflatten(-1, (-1, self.block))
        scale = packed["weight_scale"].float()[..., None]
        return Blocks(codes, (scale, packed["weight_global_scale"].view(1, 1, 1)))

    def pack(self, blocks: Blocks, packed: Packed) -> Packed:
        scale = blocks.scales[0].squeeze(-1).to(packed["weight_scale"].dtype)
        return {**packed, "weight_packed": gather(blocks.codes.flatten(-2), 4, 1), "weight_scale": scale}

    def scaled(self, levels: Tensor, scales: Scales) -> Tensor:
        return (levels * self.scale_and_offset(scales)[0]).to(torch.bfloat16)

    def scale_and_offset(self, scales: Scales) -> tuple[Tensor, Tensor | float]:
        return scales[0] / scales[1], 0.0

    def with_factor(self, factor: Tensor, scales: Scales) -> Scales:
        return (factor * scales[1]).clamp(0, torch.finfo(FLOAT8).max).to(FLOAT8).float(), scales[1]


class Integer(Codec):
    """Integers of 4 or 8 bits with a scale, and perhaps a zero point, for each group of inputs or for each output."""

    def __init__(self, bits: int, group: int | None = None) -> None:
        """Describe a format.

        Args:
            bits: Bits of a code.
            group: Inputs that have a scale; default: all of an output, or the whole weight.
        """
        self.name, self.bits, self.group, self.block = f"INT{bits}", bits, group, group or 1
        self.levels = torch.arange(1 << bits, dtype=torch.float32) - (1 << bits - 1)

    def unpack(self, packed: Packed) -> Blocks:
        if "weight" in packed:
            codes = (packed["weight"].short() + (1 << self.bits - 1)).to(torch.uint8)
        else:
            codes = _numbers(packed["weight_packed"], self.bits)[:, : int(packed["weight_shape"][-1])]
        scale = packed["weight_scale"]
        scale = scale.view(-1, 1, 1) if self.group is None else scale[..., None]
        codes, zero = codes.unflatten(-1, (-1, self.group or codes.shape[-1])), packed.get("weight_zero_point")
        if zero is None:
            return Blocks(codes, (scale,))
        if zero.dtype == torch.int32:  # several outputs share a number
            zero = _numbers(zero.t(), self.bits).t()[: codes.shape[0]].to(torch.int8) - (1 << self.bits - 1)
        return Blocks(codes, (scale, zero.reshape(scale.shape).to(scale.dtype)))

    def pack(self, blocks: Blocks, packed: Packed) -> Packed:
        codes = blocks.codes.flatten(-2)
        made: Packed = {} if self.group is None else {"weight_scale": blocks.scales[0].squeeze(-1)}
        if "weight" in packed:
            made["weight"] = (codes.short() - (1 << self.bits - 1)).to(torch.int8)
        else:
            whole = _numbers(packed["weight_packed"], self.bits)  # with what fills the last number
            whole[:, : codes.shape[-1]] = codes
            made["weight_packed"] = gather(whole, self.bits, 1).view(torch.int32)
        return {**packed, **made}

    def scaled(self, levels: Tensor, scales: Scales) -> Tensor:
        return self.shifted(levels.to(scales[0].dtype), scales) * scales[0]

    def scale_and_offset(self, scales: Scales) -> tuple[Tensor, Tensor | float]:
        scale, *zero = (one.float() for one in scales)
        return scale, -zero[0] * scale if zero else 0.0

    def shifted(self, levels: Tensor, scales: Scales) -> Tensor:
        return levels - scales[1] if len(scales) > 1 else levels

    def with_factor(self, factor: Tensor, scales: Scales) -> Scales:
        return factor.clamp(min=0).to(scales[0].dtype), *scales[1:]


def _numbers(packed: Tensor, bits: int) -> Tensor:
    """The numbers in rows of int32, those in the lowest bits first, uint8."""
    return spread(packed.contiguous().view(torch.uint8), bits, 1)


def codec_of(weights: dict[str, Any]) -> Codec:
    """Find the codec of a format.

    Args:
        weights: What the config of a checkpoint says of the weights of a group of layers: `num_bits`, `type`,
            `strategy`, `group_size`, `block_structure` and `actorder`, as compressed-tensors names them.

    Raises:
        ValueError: There is no codec.
    """
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    group, tile = weights.get("group_size"), weights.get("block_structure")
    whole = strategy in ("tensor", "channel")
    if weights.get("actorder") in (None, False, "weight", "static"):  # these two change the calibration alone
        if kind == "float" and bits == 8 and (whole or strategy == "block" and tile):
            return Float8((tile[0], tile[1]) if tile and not whole else None)
        if kind == "float" and bits == 4 and strategy == "tensor_group" and group == Nvfp4.block:
            return Nvfp4()
        if kind == "int" and bits in (4, 8) and (whole or strategy == "group" and group):
            return Integer(bits, None if whole else group)
    asked = ", ".join(f"{key}={value}" for key, value in weights.items() if value is not None)
    raise ValueError(
        "no codec of compressed-tensors for weights of this format; there are FP8 by tensor, channel and block, NVFP4, "
        f"and INT4 and INT8 by group and channel, without actorder, got {asked}"
    )


# ---- NF4 of bitsandbytes --------------------------------------------------------------------------------------------


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

    def with_factor(self, factor: Tensor, scales: Scales) -> Scales:
        return (factor.clamp(min=0),)
