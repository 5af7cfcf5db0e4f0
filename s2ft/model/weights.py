"""The weights of a model: where they are, in which order their units are, and the update that is trained of one.

Code that reads or writes a weight finds it once, by :func:`weight_at`, and uses the handle. Only the file of a layer
contains how its weight is stored, see :class:`s2ft.layers.Kind`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from s2ft.distributed import (
    Shard,
    Split,
    full_shape,
    full_values,
    gathered_parameter,
    has_values,
    is_dtensor,
    is_partitioned,
    is_spread,
    own_shard,
    reads_weights,
    sum_over_shards,
)
from s2ft.layers import EXPERTS, LINEAR, TRANSPOSED_EXPERTS, Kind, kind_of
from s2ft.layers.quantized import unpack
from s2ft.model.coupling import Coupling, Projection, by_key
from s2ft.ops import permute_
from s2ft.ops.in_place import WRITING, check_private


def find(model: nn.Module, path: str) -> Any:
    """Find what has this name in a model.

    Returns:
        The module, parameter or buffer.

    Raises:
        AttributeError: Nothing has this name.
    """
    module: Any = model
    for name in path.split("."):  # faster than get_submodule: a switch of adapters looks up every layer
        module = module._modules.get(name)
        if module is None:
            break
    else:
        return module
    parent, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(parent), name)
    if not isinstance(found, (nn.Module, Tensor)):
        raise AttributeError(f"{path} is neither a module nor a tensor")
    return found


def get(module: Any, path: str) -> Any:
    """What has this path in a module, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


@dataclass(slots=True)
class WeightHandle:
    """A weight of a model, found once.

    Attributes:
        path: Path of its layer or parameter in the model.
        holder: The layer that has the weight, plain or trainable, or the parameter with the weights of all experts.
        kind: Kind of the plain layer.
        expert: Number of the expert, for weights of several experts.
    """

    path: str
    holder: Any
    kind: Kind
    expert: int | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter as it is stored, with all experts."""
        return self.kind.weight(self.holder)

    @property
    def bias(self) -> Tensor | None:
        """The bias [outputs], or None."""
        return self.kind.bias(self.holder)

    @property
    def matrix(self) -> Tensor:
        """The weight as outputs × inputs (× taps), detached: a view, or for a quantized weight a dequantized copy."""
        return self.kind.matrix(self.holder, self.expert)

    @property
    def shape(self) -> torch.Size:
        """The shape of :attr:`matrix`, without reading the weight."""
        return self.kind.shape(self.holder, self.expert)

    @property
    def dtype_name(self) -> str:
        """The weight's dtype in words."""
        return self.kind.dtype_name(self.holder)

    @property
    def read_only(self) -> str | None:
        """Why values can't be written into the weight, as a sentence; None if they can."""
        return self.kind.read_only

    def view(self, tensor: Tensor) -> Tensor:
        """View a tensor of the stored weight's shape, for instance its gradient, as :attr:`matrix` views the weight."""
        return self.kind.view(tensor, self.expert)

    @property
    def split(self) -> Split | None:
        """How tensor parallelism has split the weight; None if it has not."""
        return self.kind.split(self.holder)

    def full(self) -> AbstractContextManager[Tensor]:
        """Open the complete weight for reading: as it is stored, with all experts, or dequantized.

        :meth:`view` of it is the matrix of this projection. A weight that is whole here is not copied. One that is
        spread over ranks is gathered, and every one of these ranks must call this. One on the meta device is read from
        its file, if it has one (`_s2ft_values`).

        Raises:
            ValueError: The weight is on the meta device, and there is no file to read it from.
        """
        return nullcontext(self.matrix) if self.read_only else full_values(self.tensor)

    @contextmanager
    def shard(self) -> Iterator[Shard]:
        """Open the part of :attr:`matrix` that this rank can write, in the weight's own memory.

        That is the full matrix, unless FSDP2 shards it. Under ZeRO-3 every rank must call this and write the same
        values.
        """
        weight = self.tensor
        with gathered_parameter(weight):
            yield self.kind.shard(own_shard(weight), self.expert) if is_dtensor(weight) else Shard(self.matrix)


def weight_at(model: nn.Module, projection: Projection) -> WeightHandle:
    """Find the weight of a projection.

    Raises:
        AttributeError: The model has no module or parameter of the projection's path.
    """
    found = find(model, projection.path)
    if type(found) is nn.Linear and type(found.weight) is nn.Parameter:  # nearly all are; a quantized tensor is not
        return WeightHandle(projection.path, found, LINEAR)
    kind = kind_of(found)
    if kind is EXPERTS and projection.transposed:  # nothing but the projection says it
        kind = TRANSPOSED_EXPERTS
    return WeightHandle(projection.path, found, kind, projection.expert)


def split_of_units(model: nn.Module, projection: Projection) -> Split | None:
    """How tensor parallelism has split the units of a projection; None if each of its ranks has all of them."""
    split = weight_at(model, projection).split
    return split if split is not None and split.dim == projection.dim else None


def tensors_of(model: nn.Module, coupling: Coupling) -> list[Tensor]:
    """The weights, biases and vectors that a new order of the coupling's units reorders."""
    tensors = [find(model, vector.path) for vector in coupling.vectors]
    for projection in coupling.projections:
        handle = weight_at(model, projection)
        bias = handle.bias if projection.dim == 0 else None
        tensors += [handle.tensor] + ([] if bias is None else [bias])
    return tensors


def any_on_meta(model: nn.Module, couplings: Iterable[Coupling]) -> bool:
    """Whether a weight, bias or vector of these couplings is on the meta device."""
    return any(tensor.is_meta for coupling in couplings for tensor in tensors_of(model, coupling))


def have_values(model: nn.Module, couplings: Iterable[Coupling]) -> bool:
    """Whether this rank can read all weights, biases and vectors of these couplings."""
    tensors = [tensor for coupling in couplings for tensor in tensors_of(model, coupling)]
    return all(map(has_values, tensors)) and (reads_weights() or any(map(is_spread, tensors)))


def can_run(model: nn.Module) -> bool:
    """Whether this rank can run a model on data before it is trained."""
    parameters = list(model.parameters())
    return not any(p.is_meta for p in parameters) and (reads_weights() or any(map(is_spread, parameters)))


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters; a packed weight counts as the parameters that it stands for."""
    packed = {id(m.weight): kind.shape(m).numel() for m in model.modules() if (kind := kind_of(m)).read_only}
    return sum(packed.get(id(parameter), full_shape(parameter).numel()) for parameter in model.parameters())


def layers_that_repack(model: nn.Module) -> list[nn.Module]:
    """The Linear4bit layers of bitsandbytes that may pack their weights in another way when they run.

    On CPUs with AVX512-BF16, the first forward in evaluation mode does so, for a product in bfloat16. From then on the
    layer passes no gradient, even in training mode: after one evaluation, training would go wrong without an error. So
    layers stay unpacked while something is trained.
    """
    return [module for module in model.modules() if vars(module).get("support_avx512bf16_for_cpu")]


def set_repacking(layers: Iterable[Any], allowed: bool) -> None:
    """Allow layers to pack their weights at their next forward; or unpack them, and keep them unpacked from now on."""
    for layer in layers:
        layer.support_avx512bf16_for_cpu = allowed
        if not allowed:
            unpack(layer)


def put(model: nn.Module, path: str, thing: nn.Module | nn.Parameter, position: int | None = None) -> None:
    """Replace the module or parameter of this name. An interrupt leaves the old one or the new one there.

    Args:
        model: The model.
        path: The name.
        thing: The module or parameter to put there. It may be there already.
        position: Where a parameter goes among the parameters of its module; default: last.
    """
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(thing, nn.Module):
        owner._modules[name] = thing
        owner._parameters.pop(name, None)
        return
    rest = [(key, parameter) for key, parameter in owner._parameters.items() if key != name]
    rest.insert(len(rest) if position is None else position, (name, thing))
    owner._parameters = dict(rest)  # one step: an interrupt between two could lose a parameter
    owner._modules.pop(name, None)


def parameter_position(model: nn.Module, path: str) -> int:
    """The position of a parameter among the parameters of its module, for :func:`put`."""
    parent, _, name = path.rpartition(".")
    return list(model.get_submodule(parent)._parameters).index(name)


# ---- the order that makes selected units contiguous, and how it is applied -----------------------------------------


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
    depth = torch.zeros(count, dtype=torch.int64, device="cpu")  # number of producers that have selected the unit
    for units in producers:
        depth[units] += 1
    consumed = torch.zeros(count, dtype=torch.bool, device="cpu")
    if consumer is not None:
        consumed[consumer] = True
    wide = len(producers)
    rank = torch.where(consumed, torch.where(depth > 0, 2 * wide - depth, 2 * wide), depth - 1)
    chosen = (consumed | (depth > 0)).nonzero().squeeze(1)
    return place_first(count, chosen[rank[chosen].argsort(stable=True)])


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
    order = torch.arange(blocks.numel(), device="cpu")
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
    order = torch.arange(count, device="cpu")
    size = chosen.numel()
    is_chosen = torch.zeros(count, dtype=torch.bool, device="cpu")
    is_chosen[chosen] = True
    displaced = order[:size][~is_chosen[:size]]
    vacated = order[size:][is_chosen[size:]]
    order[:size] = chosen
    order[vacated] = displaced
    return order


def inverse(order: Tensor) -> Tensor:
    """Invert an order: position[unit] from order[position], both [count] int64."""
    positions = torch.empty_like(order)
    positions[order] = torch.arange(order.numel(), device="cpu")
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
    elements = torch.arange(projection.extent, device="cpu")
    elements[projection.elements(torch.arange(projection.count, device="cpu"))] = projection.elements(order)
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
        return (self.elements != torch.arange(self.elements.numel(), device="cpu")).nonzero().squeeze(1)

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
        # Whether the units are in the new order, and, during a change, the values that they had before it. Both are in
        # one tuple, so that they are assigned in one step.
        self._state: tuple[bool, list[Tensor] | None] = (False, None)

    @property
    def is_done(self) -> bool:
        """Whether the units are in the new order."""
        return self._state[0]

    def places(self, projection: Projection) -> Tensor:
        """The new positions [extent] int64 of a projection's elements, by their original number."""
        return inverse(element_order(projection, self.order))

    def do(self, model: nn.Module, later: bool = False) -> None:
        """Put the units in the new order, unless they are in it.

        Args:
            model: The model.
            later: Whether to leave it pending although the weights are here. Weights on the meta device always do.
        """
        if not self.is_done and (later or any_on_meta(model, [self.coupling])):
            self.is_pending = True
            return
        self._change(model, True)
        self.is_pending = False

    def undo(self, model: nn.Module, later: bool = False) -> None:
        """Put the units back in the original order, unless they are in it.

        Args:
            model: The model.
            later: Whether they are reordered again later.
        """
        self._change(model, False)
        self.is_pending = later

    def finish(self, model: nn.Module) -> None:
        """Make a pending change, if the weights are here."""
        if self.is_pending:
            self.do(model)

    def forget(self, model: nn.Module) -> None:
        """Make a change pending again, if the reordered weights have gone to the meta device."""
        if any_on_meta(model, [self.coupling]):
            self.start_again()

    def start_again(self) -> None:
        """Make a change pending again, because the weights have been loaded in the base's order, or will be."""
        if self.is_done:
            self._state, self.is_pending = (False, None), True

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


def memory_of(tensor: Tensor) -> int:
    """What two tensors have in common if they are one memory: an address, or the id where a tensor has none.

    Two parameters share memory after `load_state_dict(…, assign=True)` with a tied state, for instance.
    """
    return tensor.data_ptr() or id(tensor) if type(tensor) is nn.Parameter else id(tensor)


def restoring_moves(model: nn.Module, moves: Iterable[Move]) -> dict[int, list[MovingTensor]]:
    """What undoes the moves that are done, by the id of the tensor."""
    return by_key(
        (id(moving.tensor), moving)
        for move in moves
        if move.is_done
        for moving in moving_tensors(model, move.coupling, inverse(move.order))
    )


def check_own_memory(model: nn.Module, projections: list[Projection]) -> None:
    """Raise ValueError for a weight in read-only or shared memory, computed from others, or not quantized yet."""
    for path, projection in {projection.path: projection for projection in projections}.items():
        handle = weight_at(model, projection)
        if handle.read_only and handle.tensor.is_meta:
            raise ValueError(
                f"{path} is on the meta device ({type(handle.holder).__name__}), and its quantization is known only "
                "when it is loaded: load the quantized weights, on every rank"
            )
        if handle.read_only:
            continue
        if isinstance(handle.holder, nn.Module) and "weight" not in handle.holder._parameters:
            raise ValueError(
                f"{path}.weight is not a parameter but is computed by a hook, as by torch.nn.utils.prune and "
                "weight_norm: make it a parameter first (prune.remove, remove_weight_norm)"
            )
        if not is_spread(handle.tensor):
            check_private(f"{path}.weight" if isinstance(handle.holder, nn.Module) else path, handle.tensor)


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
    shape = list(part.tensor.shape)
    shape[part.dim] = changing.numel()
    values = part.tensor.new_zeros(shape)
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


# ---- the trained update of one projection ---------------------------------------------------------------------------


class Positions(NamedTuple):
    """Where the elements of a delta are in a weight.

    Attributes:
        move: The reordering of the weight's units for which they hold; None for the base's order.
        index: Their places in the weight, [n] int64 on its device.
    """

    move: Any
    index: Tensor  # type: ignore[assignment]  # tuple has a method of this name


@dataclass
class Delta:
    """The effective weight is the base with `values` added at `index` along `dim`.

    Attributes:
        dim: 0 for outputs (rows), 1 for inputs (columns).
        index: Elements along `dim` in the base's order, ascending, [n] int64.
        values: [n, inputs] if `dim` is 0, [outputs, n] if `dim` is 1.
        positions: Where the elements were in the weight that they were written into last; None if they were not.
    """

    dim: int
    index: Tensor
    values: Tensor
    positions: Positions | None = field(default=None, repr=False, compare=False)
