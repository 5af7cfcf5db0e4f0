"""Add the slices of each token's adapter to the output of a layer, for batches of an inference engine.

The op reads nothing from the device: what decides about a kernel is in host memory. torch.compile does not look into
it. In a CUDA graph, all decisions are left to the device, because the graph is replayed for other batches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2ft.ops._library import define
from s2ft.ops.multi_adapter_linear import without_waiting
from s2ft.vllm.slices.bank import SliceBank

# Tokens of one adapter from which on a matrix product is used. The kernel of the CPU reads an adapter once for four.
MANY = {"cpu": 48, "other": 16}


@dataclass
class Batch:
    """Which token has which slot, in buffers whose addresses never change.

    Attributes:
        slots: The slot of each token, -1 for none, shape [most tokens], int64, on the device.
        order: Tokens in the order of their groups, shape [most tokens], int64, on the device.
        groups: First entry of `order`, number of tokens, and first token or -1 if they are no neighbours. Row 0 is for
            all tokens of slots that have few, and row s + 1 for slot s if it has many. Shape [slots + 1, 3], int64, in
            host memory.
        many: Number of tokens from which on a slot has a group of its own.
    """

    slots: Tensor
    order: Tensor
    groups: Tensor
    many: int

    @classmethod
    def like(cls, slots: Tensor, count: int, many: int | None = None) -> "Batch":
        """Make the buffers.

        Args:
            slots: The engine's tensor with the slot of each token, shape [most tokens], int64. It is filled with -1.
            count: Number of slots.
            many: Number of tokens from which on a slot has a group of its own. Default: by the device.
        """
        slots.fill_(-1)
        many = MANY.get(slots.device.type, MANY["other"]) if many is None else many
        return cls(slots, torch.zeros_like(slots), torch.zeros(count + 1, 3, dtype=torch.int64), many)

    def update(self, token_slots: np.ndarray) -> None:
        """Describe the next batch. `slots` is written by the engine.

        Args:
            token_slots: The slot of each token, -1 for none, shape [tokens], in host memory.
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
        rows = torch.from_numpy(order[:begin])
        if self.order.device.type == "cuda":
            rows = rows.pin_memory()  # a copy from other memory would wait for the device
        self.order[:begin].copy_(rows, non_blocking=True)


def _first(rows: np.ndarray) -> int:
    """The first of neighbouring tokens, -1 if they are none."""
    return int(rows[0]) if len(rows) and rows[-1] - rows[0] + 1 == len(rows) else -1


def add_slices_(y: Tensor, x: Tensor, bank: SliceBank, batch: Batch) -> None:
    """Add the output of each token's slices: ``y += x @ delta.t()``, in place.

    Args:
        y: The base's output, shape [tokens, O].
        x: Input of the layer, shape [tokens, I].
        bank: The slices of all slots.
        batch: The slot of each token.

    Example:
        >>> import numpy as np
        >>> from s2ft.vllm.slices.bank import SliceBank
        >>> from s2ft.vllm.slices.product import Batch, add_slices_
        >>> bank = SliceBank(slots=1, capacity=4, width=2, dim=1)
        >>> bank.put(0, torch.tensor([2]), torch.tensor([[1.0, 10.0]]))
        >>> batch = Batch.like(torch.empty(8, dtype=torch.int64), count=1)
        >>> batch.slots[:2] = torch.tensor([0, -1])
        >>> batch.update(np.array([0, -1]))
        >>> x, y = torch.arange(6.0).view(2, 3), torch.zeros(2, 2)
        >>> add_slices_(y, x, bank, batch)
        >>> y.tolist()
        [[2.0, 20.0], [0.0, 0.0]]
    """
    torch.ops.s2ft.add_slices_(
        y, x, bank.values, bank.index, bank.offsets, bank.bounds, batch.slots, batch.order, batch.groups, bank.dim
    )


def reference(y, x, values, index, offsets, bounds, slots, order, groups, dim):
    if not (x.shape[0] and index.numel()):
        return
    if not x.dtype == y.dtype == values.dtype:  # for example a layer whose output is float32 by choice
        delta = torch.zeros(y.shape, dtype=values.dtype, device=y.device)
        reference(delta, x.to(values.dtype), values, index, offsets, bounds, slots, order, groups, dim)
        y.add_(delta)
        return
    mine = slots[: x.shape[0]]
    if _is_capturing(x):
        kernel = _kernel if x.shape[0] <= max(MANY["other"], bounds.numel() - 1) else without_waiting
        y.copy_(kernel(x, y, values, index, offsets, mine, dim))
        return
    few, *others = groups.tolist()
    if few[1]:
        _add_few(y, x, values, index, offsets, mine, order, few, dim)
    if not any(group[1] for group in others):
        return
    starts = bounds.tolist()
    for slot, group in enumerate(others):
        units = slice(starts[slot], starts[slot + 1])
        if group[1] and starts[slot] < starts[slot + 1]:
            _add_many(y, x, values[units], index[units], order, group, dim)


def _kernel(x, y, values, index, offsets, slots, dim):
    return torch.ops.s2ft.multi_adapter_linear(x, y, values, index, offsets, slots, dim)


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _add_few(y, x, values, index, offsets, slots, order, group, dim) -> None:
    """The tokens of slots that have few: a kernel that reads the slices for each token."""
    begin, count, _ = group
    if count == x.shape[0]:
        y.copy_(_kernel(x, y, values, index, offsets, slots, dim))
        return
    rows = order[begin : begin + count]
    y.index_copy_(0, rows, _kernel(x[rows], y[rows], values, index, offsets, slots[rows], dim))


def _add_many(y, x, values, index, order, group, dim) -> None:
    """The tokens of one slot: one product, whose sum with the base's output is rounded once."""
    begin, count, first = group
    together = first >= 0
    rows = slice(first, first + count) if together else order[begin : begin + count]
    if dim == 1:
        taken = x[rows].index_select(1, index)
        if together:
            y[rows].addmm_(taken, values)
        else:
            y.index_copy_(0, rows, torch.addmm(y[rows], taken, values))
        return
    part, tokens = y[rows], x[rows]
    sums = torch.addmm(part.index_select(1, index), tokens, values.t())
    if together:
        part.index_copy_(1, index, sums)
    else:
        y.index_copy_(0, rows, part.index_copy_(1, index, sums))


def _fake(y, x, values, index, offsets, bounds, slots, order, groups, dim):
    return None


define(
    "add_slices_(Tensor(a!) y, Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor bounds, Tensor slots, "
    "Tensor order, Tensor groups, int dim) -> ()",
    reference,
    _fake,
)
