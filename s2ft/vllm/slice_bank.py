"""The slices of several adapters for one layer of an inference engine, and the op that adds each token's own.

The buffers are allocated once and written in place, so that CUDA graphs that read them stay valid when adapters come
and go. The op reads nothing from the device: what decides about a kernel is in host memory. torch.compile does not look
into it. In a CUDA graph all decisions are left to the device, because the graph is replayed for other batches.
"""

import numpy as np
import torch
from torch import Tensor

from s2ft.ops._library import define
from s2ft.ops.multi_adapter_linear import without_waiting

# Tokens of one adapter from which on a matrix product is used. The kernel of the CPU reads an adapter once for four.
MANY = {"cpu": 48, "other": 16}


class SliceBank:
    """Units of a layer's outputs or inputs, with the same room for each slot.

    Attributes:
        values: One row per unit, shape [slots * capacity, width].
        index: The output or input of each unit, shape [slots * capacity], int64.
        bounds: Where the units of each slot start and end, shape [2 * slots], int64, in host memory.
        offsets: The same numbers on the device. For :func:`s2ft.ops.multi_adapter_linear` slot s is adapter 2 * s; the
            others are what is unused.
        capacity: Number of units that fit into a slot.
        dim: 0 if the units are outputs, 1 if they are inputs.

    Example:
        >>> from s2ft.vllm.slice_bank import SliceBank
        >>> bank = SliceBank(slots=2, capacity=4, width=4, dim=1)
        >>> bank.put(1, torch.tensor([5, 3]), torch.ones(2, 4))
        >>> bank.bounds.tolist(), bank.index[4:6].tolist()
        ([0, 0, 4, 6], [5, 3])
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
            capacity: Number of units of a slot.
            width: Length of a unit's row: inputs of the layer for dim 0, outputs for dim 1.
            dim: 0 if the units are outputs, 1 if they are inputs.
            dtype: Dtype of the values.
            device: Where the buffers are.
        """
        self.dim, self.capacity = dim, capacity
        self.values = torch.zeros(slots * capacity, width, dtype=dtype, device=device)
        self.index = torch.zeros(slots * capacity, dtype=torch.int64, device=device)
        self.bounds = torch.arange(slots).repeat_interleave(2) * capacity
        self.offsets = self.bounds.to(device)  # the same tensor on the CPU

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers on the device."""
        return sum(one.numel() * one.element_size() for one in (self.values, self.index, self.offsets))

    def put(self, slot: int, index: Tensor, values: Tensor) -> None:
        """Give a slot its units. What it had before is gone; other slots keep theirs.

        Args:
            slot: Number of the slot.
            index: The output or input of each unit, shape [n], int64.
            values: One row per unit, shape [n, width].

        Raises:
            ValueError: The units are more than a slot has room for. Nothing has changed. The message that helps is that
                of :func:`s2ft.vllm.layers.admit`, unless a program has put a loader of its own in place of vLLM's.
        """
        count, begin = index.numel(), slot * self.capacity
        if count > self.capacity:  # they would be written over those of another adapter
            raise ValueError(f"{count} units do not fit: a slot of this layer has room for {self.capacity}")
        self.index[begin : begin + count].copy_(index, non_blocking=True)
        self.values[begin : begin + count].copy_(values, non_blocking=True)
        self.bounds[2 * slot + 1] = begin + count
        if self.offsets is not self.bounds:
            self.offsets.copy_(self.bounds, non_blocking=True)


class SlotBatch:
    """Which token has which slot, in buffers whose addresses never change.

    Attributes:
        names: Twice the slot of each token, -1 for none, shape [most tokens], int64, on the device.
        order: Tokens in the order of their groups, shape [most tokens], int64, on the device.
        groups: First entry of `order`, number of tokens, and first token or -1 if they are no neighbours. Row 0 is for
            all tokens of slots that have few, and row s + 1 for slot s if it has many. Shape [slots + 1, 3], int64, in
            host memory.
        many: Number of tokens from which on a slot has a group of its own.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device | str = "cpu", many: int | None = None) -> None:
        """Make the buffers.

        Args:
            tokens: Largest number of tokens.
            slots: Number of slots.
            device: Where the buffers are.
            many: Number of tokens from which on a slot has a group of its own. Default: by the device.
        """
        self.names = torch.full((tokens,), -1, device=device)
        self.order = torch.zeros_like(self.names)
        self.groups = torch.zeros(slots + 1, 3, dtype=torch.int64)
        self.many = MANY.get(self.names.device.type, MANY["other"]) if many is None else many

    def update(self, token_slots: np.ndarray) -> None:
        """Describe the next batch.

        Args:
            token_slots: The slot of each token, -1 for none, shape [tokens], int64, in host memory.
        """
        self.groups.zero_()
        counts = np.bincount(token_slots + 1, minlength=len(self.groups))[1:]
        large = counts >= self.many
        kind = np.where(token_slots < 0, len(counts) + 1, np.where(large[token_slots], token_slots + 1, 0))
        order = np.argsort(kind.astype(np.int16), kind="stable")
        begin = int(counts[~large].sum())
        self.groups[0] = torch.tensor((0, begin, _first(order[:begin])))
        for slot in large.nonzero()[0].tolist():
            size = int(counts[slot])
            self.groups[slot + 1] = torch.tensor((begin, size, _first(order[begin : begin + size])))
            begin += size
        for buffer, numbers in ((self.names, np.where(token_slots < 0, -1, 2 * token_slots)), (self.order, order)):
            new = torch.from_numpy(numbers)
            if buffer.device.type == "cuda":
                new = new.pin_memory()  # a copy from other memory would wait for the device
            buffer[: len(new)].copy_(new, non_blocking=True)


def _first(rows: np.ndarray) -> int:
    """The first of neighbouring tokens, -1 if they are none."""
    return int(rows[0]) if len(rows) and rows[-1] - rows[0] + 1 == len(rows) else -1


def add_slices_(y: Tensor, x: Tensor, bank: SliceBank, batch: SlotBatch) -> None:
    """Add the output of each token's slices: ``y += x @ delta.t()``, in place.

    Args:
        y: The base's output, shape [tokens, O].
        x: Input of the layer, shape [tokens, I].
        bank: The slices of all slots.
        batch: The slot of each token.

    Example:
        >>> import numpy as np
        >>> from s2ft.vllm.slice_bank import SliceBank, SlotBatch, add_slices_
        >>> bank = SliceBank(slots=1, capacity=4, width=2, dim=1)
        >>> bank.put(0, torch.tensor([2]), torch.tensor([[1.0, 10.0]]))
        >>> batch = SlotBatch(tokens=8, slots=1)
        >>> batch.update(np.array([0, -1]))
        >>> x, y = torch.arange(6.0).view(2, 3), torch.zeros(2, 2)
        >>> add_slices_(y, x, bank, batch)
        >>> y.tolist()
        [[2.0, 20.0], [0.0, 0.0]]
    """
    torch.ops.s2ft.add_slices_(
        y, x, bank.values, bank.index, bank.offsets, bank.bounds, batch.names, batch.order, batch.groups, bank.dim
    )


def reference(y, x, values, index, offsets, bounds, names, order, groups, dim):
    if not (x.shape[0] and index.numel()):
        return
    if not x.dtype == y.dtype == values.dtype:  # for example a layer whose output is float32 by choice
        delta = torch.zeros(y.shape, dtype=values.dtype, device=y.device)
        reference(delta, x.to(values.dtype), values, index, offsets, bounds, names, order, groups, dim)
        y.add_(delta)
        return
    mine = names[: x.shape[0]]
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        kernel = _kernel if x.shape[0] <= max(MANY["other"], bounds.numel() // 2) else without_waiting
        y.copy_(kernel(x, y, values, index, offsets, mine, dim))
        return
    few, *others = groups.tolist()
    if few[1]:
        _add_few(y, x, values, index, offsets, mine, order, few, dim)
    for (begin, end), group in zip(bounds.view(-1, 2).tolist(), others):
        if group[1] and begin < end:
            _add_many(y, x, values[begin:end], index[begin:end], order, group, dim)


def _kernel(x, y, values, index, offsets, names, dim):
    return torch.ops.s2ft.multi_adapter_linear(x, y, values, index, offsets, names, dim)


def _add_few(y, x, values, index, offsets, names, order, group, dim) -> None:
    """The tokens of slots that have few: a kernel that reads the slices for each token."""
    begin, count, _ = group
    if count == x.shape[0]:
        y.copy_(_kernel(x, y, values, index, offsets, names, dim))
        return
    rows = order[begin : begin + count]
    y.index_copy_(0, rows, _kernel(x[rows], y[rows], values, index, offsets, names[rows], dim))


def _add_many(y, x, values, index, order, group, dim) -> None:
    """The tokens of one slot: one product, whose sum with the base's output is rounded once."""
    begin, count, first = group
    rows = slice(first, first + count) if first >= 0 else order[begin : begin + count]
    part = y[rows]  # of neighbours a view, else a copy
    if dim == 1:
        part.addmm_(x[rows].index_select(1, index), values)
    else:
        part.index_copy_(1, index, torch.addmm(part.index_select(1, index), x[rows], values.t()))
    if first < 0:
        y.index_copy_(0, rows, part)


define(
    "add_slices_(Tensor(a!) y, Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor bounds, Tensor names, "
    "Tensor order, Tensor groups, int dim) -> ()",
    reference,
    lambda y, x, values, index, offsets, bounds, names, order, groups, dim: None,
)
