"""A model with trainable layers in place: what s2ft knows about it, how they come in and go out again, and adapters
that are put on and taken off."""
from dataclasses import dataclass, field
from functools import cached_property
from types import MethodType
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from s2ft import extra
from s2ft.checkpointing import open_blocks
from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling, Projection, projections_of
from s2ft.delta import Delta
from s2ft.distributed import check_alike, has_master, is_sharded, settle, whole, write_units
from s2ft.extra import ExtraWeights
from s2ft.fingerprint import digest
from s2ft.layers import NO_FUSE, S2ColumnStack, S2Layer, S2QuantizedLinear, S2RowStack, experts_forward, layers_for
from s2ft.ops import act_mul, scatter_add_, swap_
from s2ft.permutation import contiguous_range, coupling_order, element_order, inverse, permute_coupling
from s2ft.quantizer import as_before, let_train
from s2ft.selection import Selection
from s2ft.weights import (find, is_quantized, moving_tensors, pack_again, pack_never, part_of, passes_gradient,
                          position, put)

RECORD = "_s2ft"   # the attribute of the model that holds its Attachment

# What the packages above do to a model that trainable layers come into, and undo when they go out
EXTENSIONS: List[Tuple[Callable[[nn.Module], None], Callable[[nn.Module], None]]] = []


@dataclass
class Part:
    """The share of one projection in a layer's s2."""

    projection: Projection
    positions: Tensor   # [n] int64, along s2's dim, of the elements below
    elements: Tensor    # [n] int64, ascending: which of the weight's elements along dim they are in original order


@dataclass
class Mount:
    """One trainable layer and what it stands for."""

    original: Optional[nn.Module]   # what it replaced, without weight and bias; None: a parameter
    layer: S2Layer
    parts: List[Part]   # one for each projection that is trained in this weight
    position: Optional[int] = None             # of a parameter among its module's


@dataclass
class Attachment:
    """Everything s2ft knows about a model it has changed."""

    couplings: List[Coupling]
    fingerprint: Dict[str, Any]
    required_grad: Dict[str, bool]                 # of every parameter, before
    given: bool = False                            # whether the couplings were given by hand
    name: Optional[str] = None                     # the trainable adapter
    config: Optional[S2FTConfig] = None
    selection: Optional[Selection] = None
    orders: List[Tuple[Coupling, Tensor]] = field(default_factory=list)   # couplings whose units moved
    mounts: Dict[str, Mount] = field(default_factory=dict)                # by path
    forwards: List[str] = field(default_factory=list)                     # modules with a forward of ours
    others: Dict[str, object] = field(default_factory=dict)               # loaded adapters by name
    active: Dict[str, float] = field(default_factory=dict)                # adapters with their weights
    unpacked: List[str] = field(default_factory=list)                     # of pack_never
    hooks: List[RemovableHandle] = field(default_factory=list)            # of open_blocks
    # what is written: where, in the whole weight or, the last says so, in this rank's part, and the base there
    applied: List[Tuple[Projection, Tensor, Tensor, bool]] = field(default_factory=list)
    extra: ExtraWeights = field(default_factory=ExtraWeights)
    places: Dict[str, Tensor] = field(default_factory=dict)   # of projections that moved: element → its present place

    @property
    def names(self) -> List[str]:
        return ([] if self.name is None else [self.name]) + list(self.others)

    def forget_mounts(self) -> None:
        """Be the record of a model without trainable layers, whose units lie where they were."""
        self.name = self.config = self.selection = None
        self.active = {}
        for done in (self.orders, self.mounts, self.forwards, self.applied, self.places, self.unpacked, self.hooks):
            done.clear()

    @cached_property
    def projections(self) -> Dict[str, Projection]:
        """By name."""
        return {projection.name: projection for projection in projections_of(self.couplings)}

    @property
    def trains(self) -> bool:
        """Whether the trainable adapter is added in the forward, where it gets gradients."""
        return self.name is not None and self.active.get(self.name) == 1

    @property
    def slices(self) -> Dict[str, Tensor]:
        """Every s2, by its name in the model."""
        return {f"{path}.s2": mount.layer.s2 for path, mount in self.mounts.items()}

    @property
    def parts(self) -> Dict[str, Tuple[Mount, Part]]:
        """By the projection's name."""
        return {part.projection.name: (mount, part) for mount in self.mounts.values() for part in mount.parts}


def attachment_of(model: nn.Module) -> Attachment:
    """The model's record. Raises: ValueError when nothing is attached."""
    record = model.__dict__.get(RECORD)
    if record is None:
        inside = next((path for path, module in model.named_modules() if RECORD in module.__dict__), None)
        raise ValueError(f"{type(model).__name__} has no S²FT adapter: " + (
            "call s2ft.attach or s2ft.load_adapter first" if inside is None else
            f"it is a wrapper of the model that has one: pass model.{inside}, or accelerator.unwrap_model(model)"))
    return record


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raises: ValueError where weights are spread over ranks, by FSDP2 or ZeRO-3."""
    path = next((path for path, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if path is not None:
        raise ValueError(f"{what} would change the layers of a model that is sharded ({path}), and what shards it "
                         "knows only those that there were: do it before, or s2ft.save_adapter here and go on with a "
                         "base that is not sharded")


# ---- in ----------------------------------------------------------------------------------------------

def mount(model: nn.Module, record: Attachment, config: S2FTConfig, selection: Selection, name: str) -> None:
    """Freeze the model, move units (layout permuted) and put trainable layers in. Checks come first.

    Raises: ValueError; RuntimeError where another rank trains other units or has another base.
    """
    check_not_sharded(model, "a trainable adapter")
    touched = [coupling for coupling in record.couplings
               if any(projection.name in selection for projection in coupling.projections)]
    orders = {}
    if config.layout == "permuted":
        movable = [coupling for coupling in touched if coupling.movable]
        _check_can_move(model, movable)
        orders = {coupling: _order(coupling, selection) for coupling in movable}
    check_gradients_pass(model)
    whole_names = extra.names_of_modules(model, record.couplings, config.modules_to_save)
    check_alike(f"adapter {name!r}", {"its selection": selection.digest, "the base": digest(record.fingerprint)})
    record.name, record.config, record.selection, record.active = name, config, selection, {name: 1.0}
    try:
        _mount_all(model, record, touched, orders)
        extra.start(model, record, whole_names, before_forward, before_load)
    except BaseException:   # out of memory, an interrupt: leave no half-converted model
        restore(model, record)
        raise


def before_forward(model: nn.Module, inputs: tuple) -> None:
    """Forward pre-hook of a model with a trainable adapter: keep the base of weights that were unfrozen by hand.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, which would get no gradient.
    """
    if not torch.compiler.is_compiling() and model.training and torch.is_grad_enabled():
        extra.watch(model, attachment_of(model))


def before_load(model: nn.Module, *_: Any) -> None:
    """load_state_dict pre-hook, likewise."""
    extra.keep_unfrozen(model, attachment_of(model))


def _mount_all(model: nn.Module, record: Attachment, touched: List[Coupling],
               orders: Dict[Coupling, Tensor]) -> None:
    setattr(model, RECORD, record)
    model.requires_grad_(False)
    record.unpacked = pack_never(model)
    let_train(model)
    sites: Dict[str, List[Part]] = {}
    for coupling in touched:
        order = orders.get(coupling)
        if order is not None:
            permute_coupling(model, coupling, order)
            record.orders.append((coupling, order))
            record.places.update((projection.name, inverse(element_order([projection], order)))
                                 for projection in coupling.projections)
        for projection in coupling.projections:
            if projection.name in record.selection:
                part = _part(projection, record.selection[projection.name], order)
                sites.setdefault(projection.path, []).append(part)
    for path, parts in sites.items():
        record.mounts[path] = _mount(model, path, parts, record.config)
    for coupling in touched:
        _replace_forward(model, coupling, record)
    record.hooks = open_blocks(model, record.mounts)
    for come, _ in EXTENSIONS:
        come(model)


def _part(projection: Projection, units: Tensor, order: Optional[Tensor]) -> Part:
    """With the elements' present places in the weight as positions."""
    places = units if order is None else inverse(order)[units]
    return Part(projection, projection.elements(places), projection.elements(units))


def _mount(model: nn.Module, path: str, parts: List[Part], config: S2FTConfig) -> Mount:
    original = find(model, path)
    if isinstance(original, nn.Parameter):
        made = Mount(None, _stack(original, parts, config), parts, position(model, path))
    else:
        made = Mount(original, _layer(original, parts, config), parts)
    put(model, path, made.layer)
    if made.original is not None and not isinstance(made.layer, S2QuantizedLinear):
        # the layer's alone: a second owner would keep them whole where the layer's are sharded or moved
        made.original.weight = made.original.bias = None
    return made


def _layer(original: nn.Module, parts: List[Part], config: S2FTConfig) -> S2Layer:
    """A slice where the parts fill one, else an index; the parts' positions become those in it."""
    dim = parts[0].projection.dim
    places = torch.cat([part.positions for part in parts])
    found = contiguous_range(places)
    if found is not None:
        where = {"start": found[0], "end": found[1]}
        for part in parts:
            part.positions = part.positions - found[0]
    else:
        where = {"index": places}
        _count_positions(parts)
    return layers_for(original)[dim].from_module(original, **where,
                                                 delta_dtype=config.delta_dtype_for(original.weight.dtype))


def _stack(original: nn.Parameter, parts: List[Part], config: S2FTConfig) -> S2Layer:
    parts.sort(key=lambda part: part.projection.expert)
    index: Dict[int, List[Tensor]] = {}
    for part in parts:
        index.setdefault(part.projection.expert, []).append(part.positions)
    _count_positions(parts)
    kind = (S2ColumnStack, S2RowStack)[parts[0].projection.dim]
    return kind(original, {expert: torch.cat(places) for expert, places in index.items()},
                config.delta_dtype_for(original.dtype))


def _count_positions(parts: List[Part]) -> None:
    """Parts lie one after the other."""
    first = 0
    for part in parts:
        part.positions = torch.arange(first, first + part.elements.numel())
        first += part.elements.numel()


def _order(coupling: Coupling, selection: Selection) -> Tensor:
    producers = [selection[p.name] for p in coupling.producers if p.name in selection]
    consumer = selection[coupling.consumer.name] if coupling.consumer.name in selection else None
    return coupling_order(coupling.consumer.count, producers, consumer)


def _check_can_move(model: nn.Module, couplings: List[Coupling]) -> None:
    why = next((why for why in _obstacles(model, couplings) if why), "")
    if why:
        raise ValueError(f"{why}, whose units can't change place: use layout='indexed'")


def that_can_move(model: nn.Module, couplings: List[Coupling]) -> List[Coupling]:
    """Those whose units can change place, by themselves and with the weights as they are."""
    movable = [coupling for coupling in couplings if coupling.movable]
    return [coupling for coupling, why in zip(movable, _obstacles(model, movable)) if not why]


def _obstacles(model: nn.Module, couplings: List[Coupling]) -> Iterator[str]:
    """For each coupling what of its weights keeps its units in place, in words; empty where nothing does."""
    owners: Dict[int, List[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(key)
    for coupling in couplings:
        quantized = [(p.path, found) for p in coupling.projections if is_quantized(found := find(model, p.path))]
        names = (owners.get(id(tensor), []) for tensor in moving_tensors(model, coupling))
        tied = next((found for found in names if len(found) > 1), None)
        if quantized:
            yield f"{quantized[0][0]} is a quantized weight ({type(quantized[0][1]).__name__})"
        else:
            yield f"{' and '.join(tied)} are one tied weight" if tied else ""


def check_gradients_pass(model: nn.Module) -> None:
    """Anywhere in the model: layers that aren't trained stand between the loss and those that are."""
    for path, module in model.named_modules():
        if is_quantized(module) and not passes_gradient(module):
            raise ValueError(f"{path} ({type(module.weight).__name__}) passes no gradient to its input, for it "
                             "quantizes that too: use a configuration that quantizes weights only")


def check_can_merge(record: Attachment) -> None:
    """Raises: ValueError for a quantized base."""
    for path, mount in record.mounts.items():
        if isinstance(mount.layer, S2QuantizedLinear):
            raise ValueError(f"{path}: {NO_FUSE}")


# ---- forwards of our own -------------------------------------------------------------------------------

def gated_forward(activation: str) -> Callable[[nn.Module, Tensor], Tensor]:
    """The forward of a gated FFN, x [..., width] → [..., width], that keeps gate and up for the backward
    and of their product only what the down projection keeps."""
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), activation))
    return forward


def _replace_forward(model: nn.Module, coupling: Coupling, record: Attachment) -> None:
    """Experts must have :func:`experts_forward`; the block of a gated FFN gets :func:`gated_forward`, unless
    someone has replaced its forward already."""
    if coupling.consumer.expert is not None:
        path, forward = coupling.consumer.path.rpartition(".")[0], experts_forward
    elif coupling.activation is not None and record.config.fuse_ffn:
        path, forward = coupling.block, gated_forward(coupling.activation)
    else:
        return
    block = model.get_submodule(path)
    replaced = "forward" in block.__dict__ and path not in record.forwards
    if replaced and forward is experts_forward:
        raise ValueError(f"the forward of {path} has been replaced, and that one can't run experts that are trained")
    if "forward" not in block.__dict__:
        block.forward = MethodType(forward, block)
        record.forwards.append(path)


# ---- out -----------------------------------------------------------------------------------------------

def restore(model: nn.Module, record: Attachment) -> nn.Module:
    """The plain model with the weights as they are, in original order."""
    extra.stop(model, record, before_forward, before_load)
    for _, go in EXTENSIONS:
        go(model)
    for path in record.forwards:
        del model.get_submodule(path).forward
    for hook in record.hooks:
        hook.remove()
    for path, mount in reversed(record.mounts.items()):
        if mount.original is None:
            put(model, path, mount.layer.weight, mount.position)
        else:
            if not isinstance(mount.layer, S2QuantizedLinear):
                mount.original.weight, mount.original.bias = mount.layer.weight, mount.layer.bias
            mount.original.train(mount.layer.training)
            put(model, path, mount.original)
    for coupling, order in record.orders:
        permute_coupling(model, coupling, inverse(order))
    pack_again(model, record.unpacked)
    as_before(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(record.required_grad.get(key, parameter.requires_grad))
    delattr(model, RECORD)
    return model


# ---- putting adapters on and taking them off -----------------------------------------------------------

def take_off(model: nn.Module, record: Attachment) -> None:
    """Make no adapter active; the weights hold the base, bit for bit."""
    settle(model)
    extra.take_off(model, record)
    for mount in record.mounts.values():
        mount.layer.unfuse()
        mount.layer.enabled = False
    for projection, index, base, own in reversed(record.applied):
        with part_of(model, projection) as part:
            if not own:   # written before the model was sharded, if it is
                index, base = part.cut(index, base, projection.dim)
            if base.numel():
                swap_(part.tensor, index, base, projection.dim)
    record.applied.clear()
    record.active = {}


def put_on(model: nn.Module, record: Attachment, weights: Dict[str, float],
           deltas: Dict[str, Dict[str, Delta]]) -> None:
    """Make these adapters active; nothing else may be. Their weighted sum is written into the model in one pass, and
    the base that it replaces is kept. The trainable one, where its weight is 1, is added in the forward instead.

    Args:
        deltas: by adapter, of all that are written. Raises: whatever fails, with no adapter active.
    """
    trains = weights.get(record.name) == 1
    written = {name: weight for name, weight in weights.items() if not (trains and name == record.name)}
    try:
        for path in dict.fromkeys(path for name in written for path in deltas[name]):
            parts = [(deltas[name][path], weight) for name, weight in written.items() if path in deltas[name]]
            _write(model, record, record.projections[path], parts)
        extra.put_on(model, record, weights)
    except BaseException:
        take_off(model, record)
        raise
    for mount in record.mounts.values():
        mount.layer.enabled = trains
    record.active = dict(weights)


def _write(model: nn.Module, record: Attachment, projection: Projection, parts: List[Tuple[Delta, float]]) -> None:
    with part_of(model, projection) as part:
        weight = part.tensor
        found = [part.cut(_current_places(record, projection, delta.index), delta.values, projection.dim)
                 for delta, _ in parts]
        index, values = ([one[i].to(weight.device) for one in found] for i in (0, 1))
        bases = [torch.empty_like(value, dtype=weight.dtype) for value in values]
        if weight.numel():   # else all of it is on other ranks
            scatter_add_(weight, index, values, projection.dim, [weight for _, weight in parts], replaced=bases)
        record.applied += [(projection, *both, not part.whole) for both in zip(index, bases)]


def check_can_write(model: nn.Module, record: Attachment, deltas: Dict[str, Delta]) -> None:
    """Raises: ValueError where a weight that the deltas would change is quantized."""
    for projection in projections_of(record.couplings):
        found = find(model, projection.path)
        if projection.name in deltas and is_quantized(getattr(found, "linear", found)):
            raise ValueError(f"{projection.path} is quantized, and an adapter can't be written into it: load it with "
                             "trainable=True, which adds it in the forward, or load the base unquantized")


def _current_places(record: Attachment, projection: Projection, index: Tensor) -> Tensor:
    """Where a delta's elements lie now that units may have moved."""
    places = record.places.get(projection.name)
    return index if places is None else places[index]


@torch.no_grad()
def mounted_deltas(record: Attachment, state: Optional[Mapping[str, Tensor]] = None) -> Dict[str, Delta]:
    """The trainable adapter's deltas in original coordinates, copied.

    Args: state: a state_dict to take every s2 from; default: the layers' own, gathered where they are spread over
        ranks, for which all of those must call this.
    Raises: ValueError where it lacks one, or one is not whole; RuntimeError where a rank does not come.
    """
    slices = whole(record.slices) if state is None else state
    for path, mount in record.mounts.items():
        _check_is_whole(f"{path}.s2", mount, slices)
    deltas = {}
    for name, (mount, part) in record.parts.items():
        s2, dim = slices[f"{part.projection.path}.s2"].detach(), mount.layer.dim
        values = s2.index_select(dim, part.positions.to(s2.device))
        if has_master(mount.layer.s2):   # an optimizer's are float32
            values = values.to(record.config.delta_dtype_for(mount.layer.s2.dtype))
        deltas[name] = Delta(dim, part.elements.clone(), values)
    return deltas


def _check_is_whole(key: str, mount: Mount, slices: Mapping[str, Tensor]) -> None:
    if key not in slices:
        raise ValueError(f"the state given to save has no {key}")
    shape, dim = slices[key].shape, mount.layer.dim
    expected = sum(part.elements.numel() for part in mount.parts)
    if len(shape) < 2 or shape[dim] != expected or 0 in shape:
        raise ValueError(f"{key} has shape {tuple(shape)} here, not {expected} {('rows', 'columns')[dim]}: it is a "
                         "part of what is trained, so nothing is saved. FSDP2 and ZeRO-3 are gathered by themselves; under "
                         "FSDP version 1 do this in FullyShardedDataParallel.summon_full_params(model, "
                         "writeback=False), else give a state that was gathered")


@torch.no_grad()
def set_mounted_deltas(record: Attachment, deltas: Dict[str, Delta]) -> None:
    """Copy deltas of the same selection into the trainable layers, on every rank that has a part of them."""
    for name, delta in deltas.items():
        mount, part = record.parts[name]
        write_units(mount.layer.s2, part.positions, delta.values, delta.dim)
