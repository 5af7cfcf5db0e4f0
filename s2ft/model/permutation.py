"""The order that makes selected units contiguous, and how it is applied to weights and biases."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from s2ft.distributed import gathered_parameter, is_dtensor, is_partitioned, own_shard, sum_over_shards
from s2ft.files.plain_text import by_key
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.weights import find, tensors_of, weight_at
from s2ft.ops import permute_
from s2ft.ops._library import WRITING


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
        inside, *others = [
            None if chosen is None else torch.isin(units, chosen).nonzero().squeeze(1)
            for chosen in (consumer, *producers)
        ]
        order[units] = units[coupling_order(units.numel(), cast("list[Tensor]", others), inside)]
    return order


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


def element_order(projection: Projection, order: Tensor) -> Tensor:
    """The order [extent] of a weight's elements along a dimension, if the units of a projection get `order`.

    Args:
        projection: The projection. The elements of others in the same weight stay.
        order: Order of the units, [count] int64.
    """
    elements = torch.arange(projection.extent)
    elements[projection.elements(torch.arange(projection.count))] = projection.elements(order)
    return elements


class MovingTensor(NamedTuple):
    """A tensor of the model that is reordered.

    Attributes:
        tensor: The parameter or buffer as it is stored.
        elements: Order of the elements along `dim`, int64; position i gets element elements[i].
        dim: Dimension of the tensor.
        expert: Number of the expert whose part of the tensor is reordered; None: all of the tensor is.
    """

    tensor: Tensor
    elements: Tensor
    dim: int
    expert: int | None = None

    def changing(self) -> Tensor:
        """The positions that get another element, [n] int64."""
        return (self.elements != torch.arange(self.elements.numel())).nonzero().squeeze(1)

    def permute(self, tensor: Tensor) -> None:
        """Reorder a tensor of the stored shape, in place. Every rank that has a shard of it must call this."""
        moving = self._replace(tensor=tensor)
        if is_dtensor(tensor):
            _permute_shard(moving)
            return
        with gathered_parameter(tensor):
            part = cast(_OwnShard, _OwnShard.of(moving))  # a whole tensor has every expert
            shape = part.tensor.shape  # of a convolution it has the taps in one dimension or more
            whole = part.tensor if len(shape) <= 3 else part.tensor.view(*shape[:2], -1)
            permute_(whole, self.elements.to(whole.device), part.dim)


def moving_tensors(model: nn.Module, coupling: Coupling, order: Tensor) -> Iterator[MovingTensor]:
    """Iterate over everything that a new order of a coupling's units reorders: weights, biases and vectors.

    Args:
        model: The model.
        coupling: The coupling.
        order: Order of its units [count] int64; position i gets unit order[i].
    """
    for projection in coupling.projections:
        handle, elements = weight_at(model, projection), element_order(projection, order)
        dim = 1 - projection.dim if handle.kind.transposed else projection.dim
        yield MovingTensor(handle.tensor, elements, dim + (projection.expert is not None), projection.expert)
        if projection.dim == 0 and handle.bias is not None:
            yield MovingTensor(handle.bias, elements, 0)
    for vector in coupling.vectors:
        moved = Projection("u", vector.path, order.numel(), vector.unit, 0, start=vector.start, size=vector.size)
        dim = int(vector.expert is not None)
        yield MovingTensor(find(model, vector.path), element_order(moved, order), dim, vector.expert)


class Move:
    """Puts the units of one coupling in another order, and back. An interrupt at any moment does no harm.

    Before anything is written, the present values of the units that change place are kept. So :meth:`recover` can
    revert a change that was interrupted between two tensors, any number of times.

    Weights may be spread over ranks: every one of these ranks then makes the same change at the same time, and each
    writes its own shard. Weights may be on the meta device: the change is then pending, until :meth:`finish` is called
    with the weights in the base's order.
    """

    def __init__(self, coupling: Coupling, order: Tensor) -> None:
        """Prepare the change; no weight changes yet.

        Args:
            coupling: The coupling.
            order: Order of its units [count] int64; position i gets unit order[i].
        """
        self.coupling, self.order = coupling, order
        self.is_pending = False
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
            self._places[projection.name] = inverse(element_order(projection, self.order))
        return self._places[projection.name]

    def do(self, model: nn.Module, later: bool = False) -> None:
        """Put the units in the new order, unless they are in it.

        Args:
            model: The model.
            later: Whether to leave it pending although the weights are here. Weights on the meta device always do.
        """
        if not self.is_done and (later or self._is_without_numbers(model)):
            self.is_pending = True
            return
        self._change(model, True)
        self.is_pending = False

    def undo(self, model: nn.Module) -> None:
        """Put the units back in the original order, unless they are in it."""
        self.is_pending = False
        self._change(model, False)

    def finish(self, model: nn.Module) -> None:
        """Make a pending change, if the weights are here."""
        if self.is_pending:
            self.do(model)

    def postpone(self, model: nn.Module) -> None:
        """Put the units back in the original order, to be reordered later."""
        self._change(model, False)
        self.is_pending = True

    def forget(self, model: nn.Module) -> None:
        """Make a change pending again, if the reordered weights have gone to the meta device."""
        if self._is_without_numbers(model):
            self.start_again()

    def start_again(self) -> None:
        """Make a change pending again, because the weights have been loaded in the base's order, or will be."""
        if self.is_done:
            self._state, self.is_pending = (False, None), True

    def _is_without_numbers(self, model: nn.Module) -> bool:
        return any(tensor.is_meta for tensor in tensors_of(model, self.coupling))

    def recover(self, model: nn.Module) -> None:
        """Revert an interrupted change."""
        is_done, kept = self._state
        if kept is None:
            return
        for moving, values in zip(self._moving(model, not is_done), kept):
            with WRITING:
                _put_back(moving, values)
        self._state = (is_done, None)

    def _change(self, model: nn.Module, done: bool) -> None:
        self.recover(model)
        if self.is_done == done:
            return
        with WRITING:
            kept = [_keep(moving) for moving in self._moving(model, done)]
        self._state = (not done, kept)
        for moving in self._moving(model, done):
            moving.permute(moving.tensor)
        self._state = (done, None)

    def _moving(self, model: nn.Module, done: bool) -> Iterator[MovingTensor]:
        return moving_tensors(model, self.coupling, self.order if done else inverse(self.order))


def restoring_moves(model: nn.Module, moves: Iterable[Move]) -> dict[int, list[MovingTensor]]:
    """What puts the units of some moves back in the original order where it is done, by the id of the tensor."""
    return by_key(
        (id(moving.tensor), moving)
        for move in moves
        if move.is_done
        for moving in moving_tensors(model, move.coupling, inverse(move.order))
    )


# ---- one tensor, whole or spread over ranks ------------------------------------------------------------


def _keep(moving: MovingTensor) -> Tensor:
    """Copy the values of a tensor on this rank that a change will overwrite."""
    if is_partitioned(moving.tensor):
        return moving.tensor.ds_tensor.detach().clone()
    part = _OwnShard.of(moving)
    return torch.empty(0) if part is None else part.read(part.own(moving.changing()))


def _put_back(moving: MovingTensor, values: Tensor) -> None:
    """Write what :func:`_keep` returned. No other rank takes part."""
    if is_partitioned(moving.tensor):
        moving.tensor.ds_tensor.detach().copy_(values)
    elif (part := _OwnShard.of(moving)) is not None:
        part.write(part.own(moving.changing()), values)


def _permute_shard(moving: MovingTensor) -> None:
    """Reorder this rank's shard of a DTensor. Only elements that change place are sent to other ranks."""
    part, changing = _OwnShard.of(moving), moving.changing()
    if part is None or not changing.numel():
        return
    sources = moving.elements[changing]
    values = part.empty(changing.numel())
    values.index_copy_(part.dim, part.places(sources).to(values.device), part.read(part.own(sources)))
    values = sum_over_shards(values, moving.tensor, moving.dim)
    values = values.index_select(part.dim, part.places(changing).to(values.device))
    part.write(part.own(changing), values)


class _OwnShard(NamedTuple):
    """What this rank has of a tensor that is reordered, or of the expert in it.

    Attributes:
        tensor: The shard of a DTensor, or a whole tensor, in its own memory.
        dim: Its dimension that is reordered.
        find: Function of elements [n], which returns their places in the part and which of them are in it, see
            :meth:`s2ft.distributed.Shard.find`.
    """

    tensor: Tensor
    dim: int
    find: Callable[[Tensor], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, moving: MovingTensor) -> "_OwnShard | None":
        """Return this rank's part; None if the expert is on other ranks."""
        shard = own_shard(moving.tensor)
        dim, find = moving.dim, partial(shard.find, dim=moving.dim)
        if moving.expert is None:
            return cls(shard.tensor, dim, find)
        number = moving.expert - (0 if shard.start is None else shard.start[0])
        return cls(shard.tensor[number], dim - 1, find) if 0 <= number < shard.tensor.shape[0] else None

    def places(self, elements: Tensor) -> Tensor:
        """Where in `elements` [n] are those of this part, [m] int64."""
        return self.find(elements)[1].nonzero().squeeze(1)

    def own(self, elements: Tensor) -> Tensor:
        """Those of `elements` [n] that are in this part, [m] int64."""
        return elements[self.places(elements)]

    def read(self, elements: Tensor) -> Tensor:
        """Copy elements of this part: m along `dim`."""
        return self.tensor.index_select(self.dim, self.find(elements)[0].to(self.tensor.device))

    def write(self, elements: Tensor, values: Tensor) -> None:
        """Write values to elements of this part."""
        index = self.find(elements)[0].to(self.tensor.device)
        with WRITING:
            self.tensor.index_copy_(self.dim, index, values.to(self.tensor))

    def empty(self, count: int) -> Tensor:
        """Zeros of the shape of `count` elements."""
        shape = list(self.tensor.shape)
        shape[self.dim] = count
        return self.tensor.new_zeros(shape)
