"""The types of GGUF files. A packed matrix is [outputs, bytes of a row], uint8.

In the types with one scale for 32 weights it belongs to them alone. K-quants have scales of 6 or 8 bits for 32 or 16
weights, in a block of 256 with one or two scales of its own: all of them stay, and the codes under them change.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from s2ft.codecs.codec import Blocks, Codec, Scales, fitted_lines, gather, spread

HALF = 65504.0  # the largest float16
# See kvalues_iq4nl and kvalues_mxfp4 of llama.cpp: what the codes of 4 bits stand for.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

Plane = tuple[int, int, int, int]  # first byte, byte behind the last one, bits of each code, bytes of a run


class Gguf(Codec):
    """A type with one float16 scale for each block, and perhaps a float16 minimum."""

    block = 32

    def __init__(self, name: str, size: int, levels: range | tuple[int, ...], *planes: Plane) -> None:
        """Describe a type.

        Args:
            name: Its name.
            size: Bytes of a block.
            levels: What the codes stand for.
            planes: Where the bits of the codes are, those with the lowest bits first.
        """
        self.name, self.size, self.planes = name, size, planes
        self.levels = torch.tensor(levels, dtype=torch.float32)

    def unpack(self, packed: Tensor) -> Blocks:
        data = packed.unflatten(-1, (-1, self.size))
        codes, place = torch.zeros((), dtype=torch.uint8, device=data.device), 0
        for first, end, bits, span in self.planes:
            codes, place = codes | spread(data[..., first:end], bits, span) << place, place + bits
        scales = self.read_scales(data)
        return Blocks(codes.reshape(*scales[0].shape[:-1], -1), scales)

    def pack(self, blocks: Blocks, packed: Tensor) -> Tensor:
        data, place = packed.unflatten(-1, (-1, self.size)).clone(), 0
        codes = blocks.codes.reshape(*data.shape[:-1], -1)
        for first, end, bits, span in self.planes:
            data[..., first:end] = gather(codes >> place & (1 << bits) - 1, bits, span)
            place += bits
        self.write_scales(data, blocks.scales)
        return data.flatten(-2)

    def scaled(self, levels: Tensor, scales: Scales) -> Tensor:
        scale, *minimum = scales
        return levels * scale + minimum[0] if minimum else levels * scale

    def scale_and_offset(self, scales: Scales) -> tuple[Tensor, Tensor | float]:
        scale, *minimum = scales
        return scale, minimum[0] if minimum else 0.0

    def read_scales(self, data: Tensor) -> Scales:
        """The scales in blocks of bytes [..., blocks, size]."""
        return (halves(data, 0),)

    def write_scales(self, data: Tensor, scales: Scales) -> None:
        """Write the scales that belong to one block into blocks of bytes."""
        for place, scale in zip((0, 2), scales):
            data[..., place : place + 2] = scale.half().view(torch.uint8)

    def with_factor(self, factor: Tensor, scales: Scales) -> Scales:
        return (as_half(factor),)

    def candidates(self, values: Tensor, scales: Scales) -> Iterator[Scales]:
        yield from super().candidates(values, scales)
        yield from ((-scale,) for (scale,) in super().candidates(-values, scales))


class WithMinimum(Gguf):
    """A type with a scale and a minimum."""

    def read_scales(self, data: Tensor) -> Scales:
        return halves(data, 0), halves(data, 2)

    def candidates(self, values: Tensor, scales: Scales) -> Iterator[Scales]:
        smallest, largest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        count = self.levels.max().to(values)  # a GPU would multiply by the rounded inverse of a Python number
        yield as_half((largest - smallest) / count), as_half(smallest)

    def refit(self, values: Tensor, levels: Tensor, scales: Scales) -> Scales:
        scale, minimum = fitted_lines(values, levels)
        return as_half(scale), as_half(minimum)


class Microscaled(Gguf):
    """MXFP4: a scale is a power of two, of which the file has the exponent."""

    def refit(self, values: Tensor, levels: Tensor, scales: Scales) -> Scales:
        return scales  # all powers of two that can be nearest are candidates

    def read_scales(self, data: Tensor) -> Scales:
        return (power(data[..., :1].int()),)

    def write_scales(self, data: Tensor, scales: Scales) -> None:
        data[..., :1] = (scales[0].frexp().exponent + 127).to(torch.uint8)

    def candidates(self, values: Tensor, scales: Scales) -> Iterator[Scales]:
        least = values.abs().amax(-1, keepdim=True).frexp().exponent + 124  # the largest level is 12, below 2 ** 4
        for more in (0, 1, -1):
            yield (power((least + more).clamp(0, 254)),)


def power(exponent: Tensor) -> Tensor:
    """2 ** (exponent - 128) of whole numbers from 0 to 255, by the bits of float32."""
    return torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), exponent - 1 << 23).view(torch.float32)


class KQuant(Gguf):
    """Q4_K and Q5_K: two scales for 256 weights, and scales and minima of 6 bits for 32."""

    block = 1

    def read_scales(self, data: Tensor) -> Scales:
        scale, minimum, high = data[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
        scale = torch.cat([scale & 0x3F, high & 0x0F | scale >> 2 & 0x30], -1).float() * halves(data, 0)
        minimum = torch.cat([minimum & 0x3F, high >> 4 | minimum >> 2 & 0x30], -1).float() * halves(data, 2)
        return scale.flatten(-2)[..., None], -minimum.flatten(-2)[..., None]

    def write_scales(self, data: Tensor, scales: Scales) -> None:
        """Change nothing: each scale belongs to more weights than one."""


class Q6K(KQuant):
    """Q6_K: one scale for 256 weights, and scales of 8 bits for 16."""

    def read_scales(self, data: Tensor) -> Scales:
        return ((data[..., 192:208].contiguous().view(torch.int8).float() * halves(data, 208)).flatten(-2)[..., None],)


def halves(data: Tensor, place: int) -> Tensor:
    """The float16 at a place of each block, as float32, [..., 1]."""
    return data[..., place : place + 2].contiguous().view(torch.float16).float()


def as_half(scale: Tensor) -> Tensor:
    """Round to the nearest finite float16."""
    return scale.clamp(-HALF, HALF).half().float()


TYPES: dict[str, Gguf] = {
    one.name: one
    for one in (
        Gguf("Q4_0", 18, range(-8, 8), (2, 18, 4, 16)),
        WithMinimum("Q4_1", 20, range(16), (4, 20, 4, 16)),
        Gguf("Q5_0", 22, range(-16, 16), (6, 22, 4, 16), (2, 6, 1, 1)),
        WithMinimum("Q5_1", 24, range(32), (8, 24, 4, 16), (4, 8, 1, 1)),
        Gguf("Q8_0", 34, (*range(128), *range(-128, 0)), (2, 34, 8, 32)),
        KQuant("Q4_K", 144, range(16), (16, 144, 4, 32)),
        KQuant("Q5_K", 176, range(32), (48, 176, 4, 32), (16, 48, 1, 32)),
        Q6K("Q6_K", 210, range(-32, 32), (0, 128, 4, 64), (128, 192, 2, 32)),
        Gguf("IQ4_NL", 18, IQ4_NL, (2, 18, 4, 16)),
        Microscaled("MXFP4", 17, MXFP4, (1, 17, 4, 16)),
    )
}
