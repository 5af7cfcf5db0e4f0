"""What a codec is: a packed matrix as codes and scales, its values, and the nearest codes to new values."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scales = tuple[Tensor, ...]


class Blocks(NamedTuple):
    """A packed matrix, or some rows or columns of it, unpacked to its codes.

    Attributes:
        codes: One code for each weight, [outputs, blocks, inputs of a block], uint8.
        scales: What the codec computes the values from besides the codes, each [outputs or 1, blocks or 1, 1].
    """

    codes: Tensor
    scales: Scales

    def take(self, index: Tensor, dim: int) -> "Blocks":
        """Some rows or columns.

        Args:
            index: Their numbers [n] int64.
            dim: 0 for rows, 1 for columns.

        Returns:
            The rows; or the columns, in whole blocks if they are whole blocks, else each as a block of its own.
        """
        index = index.to(self.codes.device)
        if dim == 0:
            return Blocks(self.codes[index], tuple(one[index] if one.shape[0] > 1 else one for one in self.scales))
        size = self.codes.shape[-1]
        if is_whole(index, size):
            here, codes = index[::size] // size, self.codes[:, index[::size] // size]
        else:
            here, codes = index // size, self.codes.flatten(-2)[:, index, None]
        return Blocks(codes, tuple(one[:, here] if one.shape[1] > 1 else one for one in self.scales))

    def put(self, index: Tensor, dim: int, part: "Blocks") -> "Blocks":
        """A copy with other rows or columns, which :meth:`take` has taken with the same arguments."""
        index, scales = index.to(self.codes.device), [one.clone() for one in self.scales]
        codes = self.codes.clone(memory_format=torch.contiguous_format)  # so that the flat one is a view
        size = codes.shape[-1]
        if dim == 0:
            places: Any = index
            codes[index] = part.codes
        else:
            places = slice(None), (index[::size] if is_whole(index, size) else index) // size
            codes.flatten(-2)[:, index] = part.codes.flatten(-2)
        for own, new in zip(scales, part.scales):
            if own.shape[dim] == codes.shape[dim]:
                own[places] = new
        return Blocks(codes, tuple(scales))


def is_whole(index: Tensor, block: int) -> bool:
    """Whether columns [n] int64, in ascending order, are whole blocks."""
    return index.numel() % block == 0 and torch.equal(
        index, (index[::block, None] // block * block + torch.arange(block).to(index)).flatten()
    )


class Codec(ABC):
    """How a format packs a weight matrix. Each family of formats is a file of this folder.

    A packed matrix is what the format's own files hold: a tensor of bytes, or several tensors by name.

    Attributes:
        name: The format's name.
        block: Inputs of one output that have a scale of their own, which :meth:`encode` may change with their codes.
            1 if the scales belong to more weights than that: they never change.
        levels: What each code stands for before it is scaled, [codes] float32; not finite for codes that mean no
            number.
    """

    name: str
    block = 1
    levels: Tensor

    @abstractmethod
    def unpack(self, packed: Any) -> Blocks:
        """Unpack a matrix to its codes and scales."""

    @abstractmethod
    def pack(self, blocks: Blocks, packed: Any) -> Any:
        """Return a packed matrix with these codes, and with these scales where they belong to a block.

        `packed` does not change. A tensor of it that stays is the same object in the result.
        """

    @abstractmethod
    def scaled(self, levels: Tensor, scales: Scales) -> Tensor:
        """The values of some levels, as the format's own library computes them."""

    def scale_and_offset(self, scales: Scales) -> tuple[Tensor, Tensor | float]:
        """The factor and the summand that make a value from a level, within rounding."""
        return scales[0].float(), 0.0

    # ---- for a format whose scales belong to a block ---------------------------------------------------

    def shifted(self, levels: Tensor, scales: Scales) -> Tensor:
        """The levels as they are multiplied by the factor."""
        return levels

    def with_factor(self, factor: Tensor, scales: Scales) -> Scales:
        """The scales with another factor [outputs, blocks, 1] for each block, rounded to one that the format has."""
        raise NotImplementedError

    def candidates(self, values: Tensor, scales: Scales) -> Iterator[Scales]:
        """Other scales for these values [outputs, blocks, block]: the smallest under which the levels cover a block."""
        low, high = (self.shifted(one, scales) for one in self._grid(values.device).sorted[[0, -1]].split(1))
        smallest, largest = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
        yield self.with_factor(torch.maximum(largest / high, smallest / low), scales)

    def refit(self, values: Tensor, levels: Tensor, scales: Scales) -> Scales:
        """The scales under which some levels are nearest to the values, of those of a block.

        Args:
            values: The values [outputs, blocks, block].
            levels: The levels, of the same shape.
            scales: The scales under which these levels were found.
        """
        levels = self.shifted(levels, scales)
        squares = _sum(levels.square())
        return self.with_factor((_sum(values * levels) / torch.where(squares > 0, squares, 1.0)).float(), scales)

    # ---- the same for all formats ------------------------------------------------------------------

    def decode(self, packed: Any) -> Tensor:
        """Return the values [outputs, inputs] of a packed matrix, those of the format's own library bit for bit."""
        return self.values(self.unpack(packed))

    def added(self, packed: Any, index: Tensor, dim: int, delta: Tensor) -> Any:
        """Return a packed matrix with a delta added to some units. Nothing else of it changes.

        Args:
            packed: The matrix.
            index: Rows or columns [n] int64, ascending.
            dim: 0 for rows, 1 for columns.
            delta: What is added: [n, inputs] or [outputs, n].
        """
        blocks = self.unpack(packed)
        part = blocks.take(index, dim)
        return self.pack(blocks.put(index, dim, self.nearest(self.values(part).float() + delta, part)), packed)

    def values(self, blocks: Blocks) -> Tensor:
        """The values [outputs, inputs] of codes and scales."""
        return self.scaled(_look_up(self._grid(blocks.codes.device).by_code, blocks.codes), blocks.scales).flatten(-2)

    def nearest(self, values: Tensor, blocks: Blocks) -> Blocks:
        """Find the codes, and the scales if whole blocks have their own, that are nearest to some values.

        Of several that are as near, the present ones stay: the values that the matrix has are packed as they are.
        The numbers are the same on every device, so that a file holds what training has multiplied by.

        Args:
            values: Values [outputs, inputs]. Where one is not finite the present code stays.
            blocks: The present codes and scales.

        Returns:
            The new ones.
        """
        values, scales = values.float().view(blocks.codes.shape), blocks.scales
        present = _look_up(self._grid(values.device).by_code, blocks.codes)
        if 1 < self.block == values.shape[-1]:
            scales = self._nearest_scales(values, present, scales)
        codes, error = self._nearest_codes(values, scales)
        return Blocks(torch.where(error < self._distance(values, present, scales), codes, blocks.codes), scales)

    def _nearest_scales(self, values: Tensor, present: Tensor, scales: Scales) -> Scales:
        """The scales of each block under which some levels are nearest; `present` are its levels."""
        grid = self._grid(values.device)
        levels = _look_up(grid.sorted, grid.nearest(self._unscaled(values, scales)))
        error = torch.minimum(self._distance(values, levels, scales), self._distance(values, present, scales))
        total = _sum(error.square_())

        for other in (*self.candidates(values, scales), None):
            if other is None:  # only from the best: a search from each takes up to twice the time, and hardly helps
                other = self.refit(values, levels, scales)
            its_levels = _look_up(grid.sorted, grid.nearest(self._unscaled(values, other)))
            its_total = _sum(self._distance(values, its_levels, other).square_())
            better = its_total < total
            total = torch.where(better, its_total, total)
            levels = torch.where(better, its_levels, levels)
            scales = tuple(torch.where(better, new, old) if new is not old else old for new, old in zip(other, scales))
        return scales

    def _nearest_codes(self, values: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
        """The nearest codes under given scales, and the distances."""
        grid, wanted = self._grid(values.device), self._unscaled(values, scales)
        places = grid.nearest(wanted)
        levels = _look_up(grid.sorted, places)
        distance = self._distance(values, levels, scales)
        # Values are rounded, so that the level on the other side may be nearer. One further away never is.
        beside = (places + wanted.sub_(levels).sign_().int()).clamp_(0, grid.sorted.numel() - 1)
        its_distance = self._distance(values, _look_up(grid.sorted, beside), scales)
        places = torch.where(its_distance < distance, beside, places)
        return _look_up(grid.code_of, places), torch.minimum(its_distance, distance)

    def _unscaled(self, values: Tensor, scales: Scales) -> Tensor:
        """Numbers among the levels, not rounded, that stand for some values."""
        factor, summand = self.scale_and_offset(scales)
        return (values - summand).div_(torch.where(factor == 0, 1.0, factor))

    def _distance(self, values: Tensor, levels: Tensor, scales: Scales) -> Tensor:
        return self.scaled(levels, scales).float().sub_(values).abs_()

    def _grid(self, device: torch.device) -> "Grid":
        found = self.__dict__.setdefault("_grids", {})
        if device not in found:
            found[device] = Grid(self.levels.to(device))
        return found[device]


class Grid:
    """The levels of a format in ascending order, each with its place from 0."""

    def __init__(self, levels: Tensor) -> None:
        """Sort levels, given by code. Those that are no numbers, and second codes of the same level, have no place."""
        self.by_code = levels
        order = levels.argsort(stable=True)
        order = order[levels[order].isfinite()]
        order = order[torch.cat([levels.new_ones(1), levels[order].diff()]) != 0]
        self.sorted, self.code_of = levels[order], order.to(torch.uint8)
        self.middles, self.places = (self.sorted[1:] + self.sorted[:-1]) / 2, None
        if torch.equal(self.middles.bfloat16().float(), self.middles):
            # The first 16 bits of a float32 then say where it lies: a look-up, in 1/30 of the time of a search
            bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=levels.device)
            below, above = bits.view(torch.bfloat16).float().chunk(2)
            places = torch.bucketize(below, self.middles), torch.bucketize(above, self.middles, right=True)
            self.places = torch.cat(places).to(torch.uint8)

    def nearest(self, wanted: Tensor) -> Tensor:
        """The places of the levels that are nearest to some numbers, int32 or uint8."""
        if self.places is None:
            return torch.bucketize(wanted, self.middles, out_int32=True)
        return _look_up(self.places, (wanted.view(torch.int32) >> 16).add_(2**15))


def _look_up(row: Tensor, places: Tensor) -> Tensor:
    return row.index_select(0, places.flatten().int()).view(places.shape)  # several times as fast as row[places]


def _sum(numbers: Tensor) -> Tensor:
    """Sums over blocks. In float64 they are exact but for rare cases, so that no device has another one."""
    return numbers.sum(-1, keepdim=True, dtype=torch.float64)


def fitted_lines(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The factors and summands [..., 1] by which levels of a block come nearest to its values."""
    count = values.shape[-1]
    level, value = _sum(levels) / count, _sum(values) / count
    spread = _sum(levels.square()) / count - level.square()
    slope = (_sum(values * levels) / count - level * value) / torch.where(spread > 0, spread, 1.0)
    return slope.float(), (value - slope * level).float()


# ---- bits ----------------------------------------------------------------------------------------------


def spread(data: Tensor, bits: int, span: int) -> Tensor:
    """Take bytes apart: of each run of `span` bytes first the lowest `bits` of all, then the next.

    Args:
        data: Bytes [..., n] uint8.
        bits: Bits of a number: 1, 2, 4 or 8.
        span: Bytes of a run.

    Returns:
        The numbers [..., n * 8 / bits], uint8.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    return (data.unflatten(-1, (-1, 1, span)) >> shifts & (1 << bits) - 1).flatten(-3)


def gather(numbers: Tensor, bits: int, span: int) -> Tensor:
    """Put bytes together again, see :func:`spread`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=numbers.device)[:, None]
    return (numbers.unflatten(-1, (-1, 8 // bits, span)) << shifts).sum(-2, dtype=torch.uint8).flatten(-2)
