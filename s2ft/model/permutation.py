"""The order that makes selected units contiguous, and its application to weights and biases."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.weights import find, weight_at
from s2ft.ops import permute_
from s2ft.ops._lock import LOCK


def coupling_order(count: int, producers: Sequence[Tensor], consumer: Tensor | None) -> Tensor:
    """New order of a coupling's units: selected ones first, each projection's in one run.

    The sequence is producer-only, both, consumer-only (paper, section 3.2). Several producers whose
    selections are nested (as every built-in metric's are) come out contiguous each: outermost first
    before the consumer's part, innermost first within it. Unselected units only make room: at most
    twice as many units change place as are selected, whatever the width.

    Args:
        count: units of the coupling.
        producers: unit numbers [n] of every producer with a selection.
        consumer: unit numbers [n], or None.
    Returns: order [count] int64; position i takes the unit order[i].
    """
    depth = torch.zeros(count, dtype=torch.int64)  # in how many producers' selections a unit is
    for units in producers:
        depth[units] += 1
    consumed = torch.zeros(count, dtype=torch.bool)
    if consumer is not None:
        consumed[consumer] = True
    wide = len(producers)
    rank = torch.where(consumed, torch.where(depth > 0, 2 * wide - depth, 2 * wide), depth - 1)
    chosen = (consumed | (depth > 0)).nonzero().squeeze(1)
    chosen = chosen[rank[chosen].argsort(stable=True)]
    return place_first(count, chosen)


def place_first(count: int, chosen: Tensor) -> Tensor:
    """Order [count] that starts with `chosen`; a unit that has to make room takes a vacated place."""
    order = torch.arange(count)
    size = chosen.numel()
    is_chosen = torch.zeros(count, dtype=torch.bool)
    is_chosen[chosen] = True
    displaced = order[:size][~is_chosen[:size]]
    vacated = order[size:][is_chosen[size:]]
    order[:size] = chosen
    order[vacated] = displaced
    return order


def inverse(order: Tensor) -> Tensor:
    """position[unit], given order[position]; both [count] int64."""
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel())
    return positions


def contiguous_range(positions: Tensor) -> tuple[int, int] | None:
    """(start, end) where positions [n] fill one range, else None."""
    start, end = int(positions.min()), int(positions.max()) + 1
    return (start, end) if end - start == positions.numel() else None


def element_order(projections: Sequence[Projection], order: Tensor) -> Tensor:
    """The order [extent] of a weight's elements along dim when the units of these projections of it take `order`."""
    elements = torch.arange(projections[0].extent)
    for projection in projections:
        elements[projection.elements(torch.arange(projection.count))] = projection.elements(order)
    return elements


class MovingTensor(NamedTuple):
    """A tensor of the model that takes a new order, and how."""

    tensor: Tensor  # a parameter or buffer, as it is stored
    view: Callable[[Tensor], Tensor]  # of a tensor of its shape: what is reordered, along dim
    elements: Tensor  # [size of the view along dim] int64: position i takes elements[i]
    dim: int


def moving_tensors(model: nn.Module, coupling: Coupling, order: Tensor) -> Iterator[MovingTensor]:
    """Everything that a new order of the coupling's units reorders: weights on both sides, biases and vectors.

    Args:
        model: the model.
        coupling: whose units take the order.
        order: [units] int64, position i takes the unit order[i].
    """
    by_weight: dict[tuple, list[Projection]] = {}
    for projection in coupling.projections:
        by_weight.setdefault((projection.weight_key, projection.dim), []).append(projection)
    for projections in by_weight.values():
        first, elements = projections[0], element_order(projections, order)
        handle = weight_at(model, first)
        yield MovingTensor(handle.tensor, handle.view, elements, first.dim)
        if first.dim == 0 and handle.bias is not None:
            yield MovingTensor(handle.bias, _itself, elements, 0)
    for vector in coupling.vectors:
        moved = Projection("u", vector.path, order.numel(), vector.unit, 0)
        yield MovingTensor(find(model, vector.path), _as_rows, element_order([moved], order), 0)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[0], -1)


class Move:
    """One coupling's units in another order, and back, whatever interrupts it.

    Before anything is written, what the units that change place hold now is kept. So a change that was interrupted
    between two tensors can be taken back, any number of times, by :meth:`recover`.
    """

    def __init__(self, coupling: Coupling, order: Tensor) -> None:
        """Args:
        coupling: whose units move.
        order: [units] int64, position i takes the unit order[i].
        """
        self.coupling, self.order = coupling, order
        self._places: dict[str, Tensor] = {}
        # (whether the units are in the new order, the present values of all units that a change under way moves)
        self._state: tuple[bool, list[Tensor] | None] = (False, None)

    @property
    def is_done(self) -> bool:
        return self._state[0]

    def places(self, projection: Projection) -> Tensor:
        """[extent] int64: where each element of one of the coupling's projections lies now, by original number."""
        if projection.name not in self._places:
            self._places[projection.name] = inverse(element_order([projection], self.order))
        return self._places[projection.name]

    def do(self, model: nn.Module) -> None:
        """Put the units in the new order, if they are not."""
        self._change(model, True)

    def undo(self, model: nn.Module) -> None:
        """Put the units back in the original order, if they are not."""
        self._change(model, False)

    def recover(self, model: nn.Module) -> None:
        """Take an interrupted change back."""
        is_done, kept = self._state
        if kept is None:
            return
        for moving, values in zip(self._moving(model, not is_done), kept):
            units = _changing(moving)
            with LOCK:
                target = moving.view(moving.tensor.detach()).transpose(0, moving.dim)
                target[units.to(target.device)] = values.to(target).transpose(0, moving.dim)
        self._state = (is_done, None)

    def _change(self, model: nn.Module, done: bool) -> None:
        self.recover(model)
        if self.is_done == done:
            return
        kept = []
        for moving in self._moving(model, done):
            with LOCK:
                view = moving.view(moving.tensor.detach())
                kept.append(view.index_select(moving.dim, _changing(moving).to(view.device)))
        self._state = (not done, kept)
        for moving in self._moving(model, done):
            view = moving.view(moving.tensor.detach())
            permute_(view, moving.elements.to(view.device), moving.dim)
        self._state = (done, None)

    def _moving(self, model: nn.Module, done: bool) -> Iterator[MovingTensor]:
        return moving_tensors(model, self.coupling, self.order if done else inverse(self.order))


def _changing(moving: MovingTensor) -> Tensor:
    """The places whose element another one takes."""
    return (moving.elements != torch.arange(moving.elements.numel())).nonzero().squeeze(1)
