"""The slices of several adapters for one layer, in buffers whose size and address never change."""

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 2**22  # bytes that are moved at once, so that a move needs little memory of its own


class BankFull(ValueError):
    """The units of all slots do not fit into the bank."""


class SliceBank:
    """Units of a layer's outputs or inputs, slot after slot, without gaps.

    The buffers are allocated once and written in place. CUDA graphs that read them stay valid when adapters come and
    go. What has to move for a new adapter is moved between two steps of the engine. An AdapterBank can't do this: its
    buffers grow, and it owns the rows of a batch and the forwards of a whole model, which are vLLM's here.

    Attributes:
        values: One row per unit, shape [capacity, width].
        index: The output or input of each unit, shape [capacity], int64.
        offsets: Where the slots' units start, shape [slots + 1], int64, on the device.
        bounds: The same numbers in host memory.
        dim: 0 if the units are outputs, 1 if they are inputs.

    Example:
        >>> from s2ft.vllm.slices.bank import SliceBank
        >>> bank = SliceBank(slots=2, capacity=8, width=4, dim=1)
        >>> bank.put(1, torch.tensor([5, 3]), torch.ones(2, 4))
        >>> bank.offsets.tolist(), bank.index[:2].tolist(), bank.free
        ([0, 0, 2], [5, 3], 6)
    """

    def __init__(
        self,
        slots: int,
        capacity: int,
        width: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate the buffers.

        Args:
            slots: Number of adapters at once.
            capacity: Number of units of all slots together.
            width: Length of a unit's row: inputs of the layer for dim 0, outputs for dim 1.
            dim: 0 if the units are outputs, 1 if they are inputs.
            dtype: Dtype of the values.
            device: Where the buffers are.
        """
        self.dim = dim
        self.values = torch.zeros(capacity, width, dtype=dtype, device=device)
        self.index = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.bounds = torch.zeros(slots + 1, dtype=torch.int64)
        self.offsets = self.bounds.to(device)  # the same tensor on the CPU

    @property
    def capacity(self) -> int:
        """Number of units that fit."""
        return self.index.numel()

    @property
    def slots(self) -> int:
        """Number of adapters at once."""
        return self.bounds.numel() - 1

    @property
    def free(self) -> int:
        """Number of units that are not used."""
        return self.capacity - int(self.bounds[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers on the device."""
        return sum(one.numel() * one.element_size() for one in (self.values, self.index, self.offsets))

    def sizes(self) -> list[int]:
        """Return the number of units of each slot."""
        return self.bounds.diff().tolist()

    def units(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return index [n] and values [n, width] of a slot, as views."""
        mine = slice(int(self.bounds[slot]), int(self.bounds[slot + 1]))
        return self.index[mine], self.values[mine]

    def put(self, slot: int, index: Tensor, values: Tensor) -> None:
        """Give a slot its units. What it had before is gone; other slots keep theirs.

        Args:
            slot: Number of the slot.
            index: The output or input of each unit, shape [n], int64.
            values: One row per unit, shape [n, width].

        Raises:
            BankFull: The units do not fit. Nothing has changed.
        """
        sizes = self.sizes()
        sizes[slot] = index.numel()
        if sum(sizes) > self.capacity:
            raise BankFull(
                f"{index.numel()} units do not fit: {self.capacity} are the budget of the layer, and "
                f"{sum(sizes) - index.numel()} are used"
            )
        self._resize(sizes, changed={slot})
        kept_index, kept_values = self.units(slot)
        kept_index.copy_(index, non_blocking=True)
        kept_values.copy_(values, non_blocking=True)

    def clear(self, slots: Iterable[int]) -> None:
        """Remove the units of these slots.

        Args:
            slots: Numbers of the slots.
        """
        gone = {slot for slot in slots if self.bounds[slot] < self.bounds[slot + 1]}
        if gone:
            self._resize([0 if slot in gone else size for slot, size in enumerate(self.sizes())], gone)

    def _resize(self, sizes: list[int], changed: set[int]) -> None:
        """Move the units of all unchanged slots to where they start now.

        The order of the slots stays. If those that move down go first, from the lowest on, and the others then, from
        the highest on, no slot is written over before it has moved.
        """
        bounds = torch.tensor([0, *sizes]).cumsum(0)
        old, new = self.bounds.tolist(), bounds.tolist()
        kept = [slot for slot, size in enumerate(sizes) if size and slot not in changed and old[slot] != new[slot]]
        for slot in kept:
            if new[slot] < old[slot]:
                self._move(old[slot], new[slot], sizes[slot])
        for slot in reversed(kept):
            if new[slot] > old[slot]:
                self._move(old[slot], new[slot], sizes[slot])
        self.bounds.copy_(bounds)
        if self.offsets is not self.bounds:
            self.offsets.copy_(self.bounds, non_blocking=True)

    def _move(self, source: int, target: int, count: int) -> None:
        """Move rows within the buffers, which may overlap."""
        step = max(1, CHUNK // max(1, self.values.shape[1] * self.values.element_size()))
        begins = list(range(0, count, step))
        for begin in begins if target < source else reversed(begins):
            size = min(step, count - begin)
            for rows in (self.values, self.index):
                rows[target + begin :][:size].copy_(rows[source + begin :][:size].clone())
