"""The order that makes selected units contiguous, and how it is applied to weights and biases."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.weights import find, weight_at
from s2ft.ops import permute_
from s2ft.ops._lock import LOCK


def coupling_order(count: int, producers: Sequence[Tensor], consumer: Tensor | None) -> Tensor:
    """Find an order of a coupling's units in which the selected units come first and those of each projection together.

    The sequence is: units of producers only, units of both sides, units of the consumer only (S²FT paper, section 3.2).
    If the selections of several producers are nested, as those of every built-in metric are, the units of each producer
    are contiguous: the outermost selection comes first before the consumer's part, the innermost first within it.
    Unselected units only make room, so at most twice as many units change place as are selected.

    Args:
        count: Number of units of the coupling.
        producers: Selected units [n] of every producer that has any.
        consumer: Selected units [n] of the consumer, or None.

    Returns:
        The order [count] int64; position i gets unit order[i].
    """
    depth = torch.zeros(count, dtype=torch.int64)  # number of producers that have selected the unit
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


def order_in_blocks(blocks: Tensor, producers: Sequence[Tensor], consumer: Tensor | None) -> Tensor:
    """Find an order in which no unit leaves its block, and each block has the order of :func:`coupling_order`.

    Tensor parallelism gives each rank a block of the units. So every rank reorders its own part of the weights, and its
    selected units are contiguous there.

    Args:
        blocks: The block of each unit of the coupling, [count] int64.
        producers: Selected units [n] of every producer that has any.
        consumer: Selected units [n] of the consumer, or None.

    Returns:
        The order [count] int64; position i gets unit order[i].
    """
    order = torch.arange(blocks.numel())
    for block in blocks.unique():
        units = (blocks == block).nonzero().squeeze(1)
        inside, *others = [_numbers_in(units, blocks.numel(), chosen) for chosen in (consumer, *producers)]
        order[units] = units[coupling_order(units.numel(), others, inside)]
    return order


def _numbers_in(units: Tensor, count: int, chosen: Tensor | None) -> Tensor | None:
    """The chosen units of a block, as positions in the block's units."""
    if chosen is None:
        return None
    is_chosen = torch.zeros(count, dtype=torch.bool)
    is_chosen[chosen] = True
    return is_chosen[units].nonzero().squeeze(1)


def place_first(count: int, chosen: Tensor) -> Tensor:
    """Find an order [count] that starts with `chosen`. A unit that makes room goes to a place that became free."""
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
    """Invert an order: position[unit] from order[position], both [count] int64."""
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel())
    return positions


def contiguous_range(positions: Tensor) -> tuple[int, int] | None:
    """Return (start, end) if positions [n] fill one range, else None."""
    start, end = int(positions.min()), int(positions.max()) + 1
    return (start, end) if end - start == positions.numel() else None


def element_order(projections: Sequence[Projection], order: Tensor) -> Tensor:
    """The order [extent] of a weight's elements along a dimension, if the units of these projections get `order`.

    Args:
        projections: Projections of one weight and one dimension.
        order: Order of the units, [count] int64.
    """
    elements = torch.arange(projections[0].extent)
    for projection in projections:
        elements[projection.elements(torch.arange(projection.count))] = projection.elements(order)
    return elements


class MovingTensor(NamedTuple):
    """A tensor of the model that is reordered.

    Attributes:
        tensor: The parameter or buffer as it is stored.
        view: Function that views a tensor of that shape so that it can be reordered along `dim`.
        elements: Order of the view's elements along `dim`, int64; position i gets element elements[i].
        dim: Dimension of the view.
    """

    tensor: Tensor
    view: Callable[[Tensor], Tensor]
    elements: Tensor
    dim: int


def moving_tensors(model: nn.Module, coupling: Coupling, order: Tensor) -> Iterator[MovingTensor]:
    """Iterate over everything that a new order of a coupling's units reorders: weights, biases and vectors.

    Args:
        model: The model.
        coupling: The coupling.
        order: Order of its units [count] int64; position i gets unit order[i].
    """
    by_weight: dict[tuple, list[Projection]] = {}
    for projection in coupling.projections:
        by_weight.setdefault((projection.weight_key, projection.dim), []).append(projection)
    for projections in by_weight.values():
        first, elements = projections[0], element_order(projections, order)
        handle = weight_at(model, first)
        yield MovingTensor(handle.tensor, handle.view, elements, first.dim)
        if first.dim == 0 and handle.bias is not None:
            yield MovingTensor(handle.bias, _unchanged, elements, 0)
    for vector in coupling.vectors:
        moved = Projection("u", vector.path, order.numel(), vector.unit, 0, start=vector.start, size=vector.size)
        view = _as_rows if vector.expert is None else partial(_rows_of, vector.expert)
        yield MovingTensor(find(model, vector.path), view, element_order([moved], order), 0)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[0], -1)


def _rows_of(expert: int, tensor: Tensor) -> Tensor:
    return _as_rows(tensor[expert])


class Move:
    """Puts the units of one coupling in another order, and back. An interrupt at any moment does no harm.

    Before anything is written, the present values of the units that change place are kept. So :meth:`recover` can
    revert a change that was interrupted between two tensors, any number of times.
    """

    def __init__(self, coupling: Coupling, order: Tensor) -> None:
        """Prepare the change; no weight changes yet.

        Args:
            coupling: The coupling.
            order: Order of its units [count] int64; position i gets unit order[i].
        """
        self.coupling, self.order = coupling, order
        self._places: dict[str, Tensor] = {}
        # Whether the units are in the new order, and, during a change, the values that they had before it. Both are in
        # one tuple, so that they are assigned in one step.
        self._state: tuple[bool, list[Tensor] | None] = (False, None)

    @property
    def is_done(self) -> bool:
        """Whether the units are in the new order."""
        return self._state[0]

    def places(self, projection: Projection) -> Tensor:
        """The new positions [extent] int64 of a projection's elements, by their original number."""
        if projection.name not in self._places:
            self._places[projection.name] = inverse(element_order([projection], self.order))
        return self._places[projection.name]

    def do(self, model: nn.Module) -> None:
        """Put the units in the new order, unless they are in it."""
        self._change(model, True)

    def undo(self, model: nn.Module) -> None:
        """Put the units back in the original order, unless they are in it."""
        self._change(model, False)

    def recover(self, model: nn.Module) -> None:
        """Revert an interrupted change."""
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
    """The positions that get another element."""
    return (moving.elements != torch.arange(moving.elements.numel())).nonzero().squeeze(1)
