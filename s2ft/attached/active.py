"""What the weights of an attached model hold: active adapters, base + s2, extra weights.

Before a weight is written, the slices that will change are recorded with the values they hold (write-ahead). Restoring
copies the recorded values back. It can be done any number of times, so an interrupt at any moment loses nothing.

Every parameter that requires a gradient is an extra weight, unless it is a slice or belongs to a coupling. The record
keeps the values before training, so that the base can be restored. A value is recorded before its parameter is written,
and writing a recorded value twice changes nothing: after an interrupt at any moment :func:`take_off_extra` restores the
base.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.adapter.adapter import check_extra_apart
from s2ft.attached.record import (
    Mount,
    Record,
    Written,
    check_plain_and_untied,
    check_slices_are_here,
    check_weights_are_here,
    coupled_names,
    record_of,
)
from s2ft.config import S2FTConfig, refuse
from s2ft.distributed import (
    full_shape,
    full_tensors,
    has_master_copy,
    is_partitioned,
    is_spread,
    reads_weights,
    reshard_all,
    write_units,
)
from s2ft.layers.base import write_all
from s2ft.model.coupling import Coupling, Projection, check_parameter_name, projections_of
from s2ft.model.weights import Delta, weight_at
from s2ft.ops import scatter_add_, swap_
from s2ft.ops.in_place import WRITING, check_private, give_own_memory, is_being_captured
from s2ft.selection import unit_tensors

logger = logging.getLogger(__name__)

# ---- which adapters are active -------------------------------------------------------------------------


def all_or_nothing(change: Callable[[], Any], recover: Callable[[], Any] | None = None) -> Any:
    """Make a change; after a failure run `recover`, by default `change` again, so that nothing stays half done.

    It is no context manager: an interrupt in the middle of ``__exit__`` would put the recovery off.

    Args:
        change: The change. Without `recover` it is called a second time after a failure, so it must be repeatable.
        recover: What to do after an interrupt, an exception or an out-of-memory error. Default: `change` again.

    Returns:
        What `change` returns.
    """
    with WRITING:
        try:
            return change()
        except BaseException:  # a model in between would compute something else
            (recover or change)()
            raise


def switch(model: nn.Module, record: Record, factors: dict[str, float]) -> None:
    """Make these adapters active in place of those that are.

    Args:
        model: Model of the record.
        record: Record that has the adapters.
        factors: Factors by adapter; empty for the base.

    Raises:
        ValueError: An adapter can't be written; nothing has changed.
    """
    is_scaled = factors.get(cast(str, record.trainable), 1) != 1
    if factors == record.active and not is_scaled and not record.change_unfinished:
        return  # a trainable adapter with another factor than 1 is written anew: it may have changed
    reshard_all(model)
    check_can_put_on_extra(model, record, factors)
    written = [name for name in factors if name != record.trainable or is_scaled]
    if written:
        check_weights_are_here(model, record)
    place_loaded(
        model,
        record,
        [name for name in written if name != record.trainable and _is_on_another_device(model, record, name)],
    )
    own_deltas = coded_deltas(record, mounted_deltas(record)) if record.trainable in written else None
    check_plain_and_untied(model, record, own_deltas or ())  # loaded adapters were checked when they were loaded
    with WRITING:
        deactivate(model, record)
        activate(model, record, factors, own_deltas)


def deactivate(model: nn.Module, record: Record) -> None:
    """Make no adapter active: the weights hold the base, bit for bit."""
    all_or_nothing(partial(_restore_base, model, record))  # an interrupt: finish what it cut short


def _restore_base(model: nn.Module, record: Record) -> None:
    record.change_unfinished, record.active = True, {}
    reshard_all(model)
    take_off_extra(model, record)
    for move in record.moves:  # first: the copies below need a whole order
        move.recover(model)
    if any(mounted.layer.fused for mounted in record.mounts.values()):  # the base is in the layers' order of units
        for move in record.moves:  # which an interrupted merge may have given up
            move.do(model)
    for mounted in record.mounts.values():
        mounted.layer.unfuse()
        mounted.layer.enabled = False
    for entry in reversed(record.written):
        give_own_memory(weight_at(model, entry.projection).tensor)
        with weight_at(model, entry.projection).shard() as shard:
            index, base = entry.index, entry.base
            if index is None:  # the model may have been sharded since
                index = record.positions_of(entry.projection, entry.delta, shard.tensor.device)
                index, base = shard.restrict(index, base, entry.projection.dim)
            if base.numel():
                # A copy, which swap_ fills with the values that it replaces: the recorded values must stay.
                base = base.to(device=shard.tensor.device, dtype=shard.tensor.dtype, copy=True)
                swap_(shard.tensor, index.to(shard.tensor.device), base, entry.projection.dim, is_checked=True)
    record.written.clear()
    record.change_unfinished = False


def activate(
    model: nn.Module, record: Record, factors: dict[str, float], own_deltas: dict[str, Delta] | None = None
) -> None:
    """Make these adapters active. Their weighted sum is written into the model in one pass.

    A trainable adapter of factor 1 is written by its layers, on top of the others.

    Args:
        model: Model with the base in its weights and no active adapter.
        record: Record of the model.
        factors: Factors by adapter.
        own_deltas: Deltas of the trainable adapter by projection, if its factor is not 1.

    Raises:
        Exception: Any failure, after which no adapter is active.
    """
    trains = factors.get(cast(str, record.trainable)) == 1
    written = {name: weight for name, weight in factors.items() if not (trains and name == record.trainable)}
    try:
        record.change_unfinished = True
        deltas = {
            name: cast("dict[str, Delta]", own_deltas) if name == record.trainable else record.loaded[name].deltas
            for name in written
        }
        for path in dict.fromkeys(path for name in written for path in deltas[name]):
            parts = [(deltas[name][path], weight) for name, weight in written.items() if path in deltas[name]]
            add_deltas(model, record, record.projections[path], parts)
        put_on_extra(model, record, factors)
        for mounted in record.mounts.values():
            mounted.layer.enabled = trains
        record.active = dict(factors)  # write_changed_layers asks for it
        write_changed_layers(model, record)
        record.change_unfinished = False
    except BaseException:
        deactivate(model, record)
        raise


def add_deltas(model: nn.Module, record: Record, projection: Projection, parts: list[tuple[Delta, float]]) -> None:
    """Add a weighted sum of deltas to a weight. What it overwrites is recorded first, for :func:`deactivate`."""
    with weight_at(model, projection).shard() as shard:
        weight, dim = shard.tensor, projection.dim
        places = [record.positions_of(projection, delta, weight.device) for delta, _ in parts]
        found = [shard.restrict(place, delta.values, dim) for place, (delta, _) in zip(places, parts)]
        index, values = ([one[i].to(weight.device) for one in found] for i in (0, 1))
        with WRITING:
            bases = [weight.index_select(dim, one) for one in index]
        for (delta, _), here, base in zip(parts, index, bases):
            record.written.append(Written(projection, delta, base, None if shard.start is None else here))
        if weight.numel():  # else all of it is on other ranks
            check_private(projection.path, weight)
            scatter_add_(weight, index, values, dim, [factor for _, factor in parts], is_checked=True)


def _is_on_another_device(model: nn.Module, record: Record, name: str) -> bool:
    """Whether the weights of a loaded adapter are not where its tensors are, judged by the first of them."""
    path, delta = next(iter(record.loaded[name].deltas.items()))
    return delta.values.device != weight_at(model, record.projections[path]).tensor.device


def place_loaded(model: nn.Module, record: Record, names: Iterable[str]) -> None:
    """Make loaded adapters ready, so that a switch sends nothing to a device and waits for nothing.

    Their tensors go to the devices of the weights, unless an adapter was loaded with a device of its own, or the
    weights are on the meta device.

    Args:
        model: Model of the record.
        record: Record that has the adapters.
        names: Names of the adapters.
    """
    for name in names:
        adapter = record.loaded[name]
        handles = {path: weight_at(model, record.projections[path]) for path in adapter.deltas}
        devices = {path: handle.tensor.device for path, handle in handles.items()}
        if adapter.extra_weights:
            parameters = dict(model.named_parameters())
            devices |= {extra: parameters[extra].device for extra in adapter.extra_weights}
        if adapter.device is None:
            record.loaded = {**record.loaded, name: adapter.beside(devices)}
        for path, delta in record.loaded[name].deltas.items():
            record.positions_of(record.projections[path], delta, devices[path])


# ---- deltas of the trainable adapter -------------------------------------------------------------------


def mounted_deltas(record: Record, state: Mapping[str, Tensor] | None = None) -> dict[str, Delta]:
    """Return copies of the trainable adapter's deltas, by projection, in the base's order.

    Args:
        record: Record of the model.
        state: A gathered state_dict that has every s2. Default: the layers' own s2, which are gathered if they are
            spread over ranks; every one of these ranks must call this.

    Raises:
        ValueError: The state lacks an s2, or has a shard of one, or the weights have not arrived.
        RuntimeError: A rank did not take part within the timeout of the process group.
    """
    check_slices_are_here(record)
    slices = full_tensors(record.slices) if state is None else state
    for path, mount in record.mounts.items():
        _check_is_whole(f"{path}.s2", mount, slices)
    deltas = {}
    for name, (mount, part) in record.parts.items():
        s2, dim = slices[f"{part.projection.path}.s2"].detach(), mount.layer.dim
        values = s2.index_select(dim, part.positions.to(s2.device))
        if has_master_copy(mount.layer.s2):  # the optimizer's copy is float32
            values = values.to(cast(S2FTConfig, record.config).delta_dtype_for(mount.layer.s2.dtype))
        deltas[name] = Delta(dim, part.elements.clone(), values)
    return deltas


def _check_is_whole(key: str, mount: Mount, slices: Mapping[str, Tensor]) -> None:
    if key not in slices:
        raise ValueError(f"the state given to save has no {key}")
    shape, dim = slices[key].shape, mount.layer.dim
    expected = sum(part.elements.numel() for part in mount.parts)
    if len(shape) < 2 or shape[dim] != expected or 0 in shape:
        raise ValueError(
            f"{key} has shape {tuple(shape)} here, not {expected} {('rows', 'columns')[dim]}: "
            "this is a shard, so nothing is saved. s2ft gathers the shards of FSDP2 and ZeRO-3 itself. Under FSDP "
            "version 1 do this inside FullyShardedDataParallel.summon_full_params(model, writeback=False). Else give a "
            "gathered state"
        )


def coded_deltas(record: Record, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Return the deltas of :func:`mounted_deltas`; those that a codec rounds are what the base's file will hold."""
    found = dict(deltas)
    for name, (mount, part) in record.parts.items():
        if (rounding := mount.layer.rounding) is not None:
            values = rounding(mount.layer.full_s2().detach()) - rounding.base
            found[name] = replace(
                found[name], values=values.index_select(rounding.dim, part.positions.to(values.device))
            )
    return found


def set_mounted_deltas(record: Record, deltas: dict[str, Delta]) -> None:
    """Copy deltas of the same selection into the trainable layers. Every rank with a shard of them must call this."""
    parts = record.parts
    for name, delta in deltas.items():
        mount, part = parts[name]
        write_units(mount.layer.s2, part.positions, delta.values, delta.dim)


# ---- a trainable adapter on top of the active ones, on units that none of them trains -------------------------


def apart_from_active(record: Record, config: S2FTConfig, couplings: Sequence[Coupling]) -> S2FTConfig:
    """Return a config that chooses no unit that an active adapter trains.

    Args:
        record: Record of a model without a trainable adapter.
        config: Config of the new adapter.
        couplings: The couplings among which it chooses. The active adapters may also have units of other towers.

    Returns:
        A copy of the config, with the units of the active adapters in its `exclude`.

    Raises:
        ValueError: The config's `units` name a unit that an active adapter trains.
    """
    if config.units is not None:
        _check_apart(record, unit_tensors(config.units, "units"))
        return config
    taken = [unit_tensors(config.exclude, "exclude")] if config.exclude is not None else []
    known = {projection.name for projection in projections_of(couplings)}
    of_active = (record.loaded[name].selection.units for name in record.active)
    taken += [{path: chosen for path, chosen in units.items() if path in known} for units in of_active]
    paths = dict.fromkeys(path for units in taken for path in units)
    exclude = {path: torch.cat([units[path] for units in taken if path in units]).unique() for path in paths}
    return replace(config, exclude=exclude or None)


def _check_apart(record: Record, units: dict[str, Tensor]) -> None:
    for name in record.active:
        theirs = record.loaded[name].selection.units
        for path in units.keys() & theirs.keys():
            shared = units[path][torch.isin(units[path], theirs[path])]
            if shared.numel():
                raise ValueError(
                    f"units names {shared.numel()} of {path} that the active adapter {name!r} trains, such as "
                    f"{int(shared[0])}: with on_top=True choose others, or let the ratios and exclude choose"
                )


# ---- base + s2 in the weights of a whole model ----------------------------------------------------------------------


@torch.compiler.disable
def write_changed_layers(model: nn.Module, record: Record) -> list[Any]:
    """Write base + s2 into every weight that holds other values of s2. Every rank of a sharded model must call this.

    Args:
        model: A model, outside of its forward.
        record: Its record.

    Returns:
        The layers (S2Layer) that were written.
    """
    if record.awaits_weights or not record.trains:
        return []
    layers = [mounted.layer for mounted in record.mounts.values() if mounted.layer.kind.read_only is None]
    layers = [layer for layer in layers if layer.enabled]
    # Code that writes into `s2.data` changes no version. So a model that may train is written always, which takes less
    # than 1 % of its step. A replay of a CUDA graph does not run this function, so that its graph writes always too.
    # What is spread over ranks has to be gathered for that.
    writes_always = torch.is_grad_enabled() or is_in_capture(layers)
    changed = [layer for layer in layers if not layer.is_surely_held or writes_always and not layer.is_managed]
    if changed:
        reshard_all(model)
        write_all(changed)
    return changed


def is_in_capture(layers: list[Any]) -> bool:
    """Whether the forward of a model with these layers is being captured in a CUDA graph."""
    return bool(layers) and is_being_captured(layers[0].weight)  # a model that is captured is on one GPU


def write_once_in_graph(model: nn.Module, layers: list[Any]) -> None:
    """Keep layers from writing their slices again in a forward that is being captured in a CUDA graph.

    Every write would be in each replay. A layer that runs outside of this forward writes its own.

    Args:
        model: A model at the beginning of its forward.
        layers: Its layers (S2Layer) that :func:`write_changed_layers` has written in this capture.
    """
    written = [layer for layer in layers if not layer.is_managed]
    for layer in written:
        layer.is_written_in_graph = True

    def end(*_: Any) -> None:
        hook.remove()
        for layer in written:
            layer.is_written_in_graph = False

    hook = model.register_forward_hook(end, always_call=True)


# ---- without the trainable adapter, in the middle of its training ----------------------------------------------


@contextmanager
def without_trainable(model: nn.Module) -> Iterator[None]:
    """Leave the trainable adapter out of the forward inside the context. Other active adapters stay.

    :func:`s2ft.disable_adapters` writes the base of extra weights into their parameters, and a graph that needs one of
    them can't be used for a backward pass any more. Here other parameters take their places, so no version changes.
    The base is written into the slices, and base + s2 again afterwards, and into extra weights that are spread over
    ranks, which FSDP2 gathers into the places of others. Every rank of a sharded model must call this.

    Args:
        model: Model with an adapter.

    Raises:
        ValueError: The model has no adapters.
    """
    record = record_of(model)
    if not record.trains:
        yield
        return
    reshard_all(model)
    with ExitStack() as stack:
        stack.callback(write_changed_layers, model, record)
        for mount in record.mounts.values():
            stack.callback(setattr, mount.layer, "enabled", True)
            mount.layer.enabled = False
            mount.layer.unfuse()
        extra, base = {name: model.get_parameter(name) for name in record.extra.base}, record.extra.base
        spread = {name: one for name, one in extra.items() if is_spread(one) or has_master_copy(one)}
        stack.callback(write_extra, spread, full_copies(spread))
        write_extra(spread, {name: base[name] for name in spread})
        known = {  # other parameters take the places of those that are whole
            id(one): nn.Parameter(base[name], requires_grad=False) for name, one in extra.items() if name not in spread
        }
        for module in model.modules() if known else ():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in known:
                    stack.callback(module._parameters.__setitem__, name, parameter)
                    module._parameters[name] = known[id(parameter)]
        yield


# ---- extra weights --------------------------------------------------------------------------------------------------

UNFROZEN = (
    "s2ft gives it no gradient while its units are trained as slices: set its requires_grad to False and train "
    "more units instead (the ratios of S2FTConfig), or s2ft.detach the model first"
)


# ---- extra weights: which these are --------------------------------------------------------------------


def parameters_to_save(model: nn.Module, couplings: list[Coupling], modules: Sequence[str] | None) -> list[str]:
    """Return the names of the parameters that a config's `modules_to_save` asks for.

    Args:
        model: The model.
        couplings: Its couplings.
        modules: Full paths of modules, or the last parts of their paths.

    Raises:
        ValueError: A name belongs to no module, or a module has no parameter that can be trained, or it contains a
            weight of a coupling.
    """
    parameters, coupled = dict(model.named_parameters()), coupled_names(couplings)
    known = {id(parameter): name for name, parameter in parameters.items()}
    names = []
    for asked in modules or ():
        paths = [path for path, _ in model.named_modules() if path == asked or path.endswith(f".{asked}")]
        if not paths:
            raise ValueError(
                f"modules_to_save names {asked!r}, which is not a module of {type(model).__name__}: its "
                f"modules are {', '.join(name for name, _ in model.named_children())} and those inside"
            )
        found = [known[id(parameter)] for path in paths for parameter in model.get_submodule(path).parameters()]
        inside = next((name for name in found if name in coupled), None)
        refuse(
            (
                inside is not None,
                f"modules_to_save names {asked!r}, which holds {inside}, a weight whose units are trained "
                "as slices: name modules outside the couplings, and train more units by the ratios",
            ),
            (
                not found or not all(parameters[name].is_floating_point() for name in found),
                f"modules_to_save names {asked!r}, which has no floating-point weights to train",
            ),
        )
        names += found
    for name in names:
        check_parameter_name(name, "modules_to_save")  # else a trained adapter could not be saved
    return list(dict.fromkeys(names))


def extra_parameters(model: nn.Module, record: Record) -> dict[str, nn.Parameter]:
    """Return the extra weights of the trainable adapter by name, recorded or unfrozen since."""
    if record.trainable is None:
        return {}
    slices = {id(mount.layer.s2) for mount in record.mounts.values()}
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in record.extra.base or (parameter.requires_grad and id(parameter) not in slices)
    }
    coupled = coupled_names(record.couplings) if len(found) > len(record.extra.base) else ()
    return {name: parameter for name, parameter in found.items() if name not in coupled}


# ---- extra weights: recording values before training ---------------------------------------------------


def unfreeze(model: nn.Module, record: Record, names: Iterable[str]) -> None:
    """Record the values of parameters, then make them require a gradient."""
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    rounded = [name for name, one in chosen.items() if one.dtype.itemsize < torch.float32.itemsize]
    if rounded:
        logger.warning(
            "%s is trained in full in %s: updates smaller than its step are lost, unless the optimizer keeps float32 "
            "copies. Load the base in float32 to train it",
            rounded[0],
            chosen[rounded[0]].dtype,
        )
    _keep_base_of(record, chosen)
    for parameter in chosen.values():
        (_with_address(model, parameter) if parameter.is_meta else parameter).requires_grad_(True)


def _with_address(model: nn.Module, parameter: nn.Parameter) -> nn.Parameter:
    """Put a parameter on the CPU in place of one on the meta device. Its memory is never written, so it costs nothing.

    accelerate tells the parameters of an optimizer apart by their address, and those on the meta device have none.
    """
    made = nn.Parameter(torch.empty_like(parameter, device="cpu"))
    for module in model.modules():
        for name in [name for name, found in module._parameters.items() if found is parameter]:
            module._parameters[name] = made
    return made


def keep_base_before_forward(model: nn.Module, record: Record) -> None:
    """Record the values of parameters that were unfrozen by hand. This runs before every training forward.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, or a parameter that DeepSpeed already holds.
    """
    if record.trainable is None:
        return
    known = {id(mount.layer.s2) for mount in record.mounts.values()}
    known |= {id(model.get_parameter(name)) for name in record.extra.base}
    if not _trains_more(model, known):
        return
    unfrozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in known
    }
    check_can_put_on_extra(model, record, record.active)  # an active adapter may have it too
    wrong = sorted(coupled_names(record.couplings).intersection(unfrozen))
    if wrong:
        raise RuntimeError(f"{wrong[0]} requires a gradient, and {UNFROZEN}")
    for name, parameter in unfrozen.items():
        if is_partitioned(parameter) or has_master_copy(parameter):
            raise RuntimeError(
                f"{name} was unfrozen by hand, and DeepSpeed already holds it, so that its value before "
                "training can't be kept: name its module in S2FTConfig's modules_to_save instead"
            )
    _keep_base_of(record, unfrozen)


def _trains_more(module: nn.Module, known: set[int]) -> bool:
    """Whether a parameter with another id requires a gradient. It runs every step; `parameters` is slower."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad and id(parameter) not in known:
            return True
    for child in module._modules.values():
        if child is not None and _trains_more(child, known):
            return True
    return False


def keep_base_of_unfrozen(model: nn.Module, record: Record) -> None:
    """Record the values of parameters that were unfrozen by hand, before anything but training changes them."""
    _keep_base_of(record, extra_parameters(model, record))


def _keep_base_of(record: Record, parameters: Mapping[str, Tensor]) -> None:
    new = {name: parameter for name, parameter in parameters.items() if name not in record.extra.base}
    arrive = record.awaits_weights and not reads_weights()  # the values here are not the base's
    kept = {name: value.detach().to("meta") for name, value in new.items()} if arrive else full_copies(new)
    record.extra.base = {**record.extra.base, **kept}


def full_copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full copies. Parameters that are spread over ranks are gathered: each of these ranks must call this."""
    return {name: value.clone() for name, value in full_tensors(parameters).items()}


# ---- extra weights: switching --------------------------------------------------------------------------


def take_off_extra(model: nn.Module, record: Record) -> None:
    """Write the base into every extra weight, bit for bit. The trained values are kept."""
    extra = record.extra
    if not extra.base and not extra.overwritten:
        return
    parameters = dict(model.named_parameters())
    holding = {name: parameters[name] for name in extra.base if name not in extra.trained}  # trained values
    extra.trained = {**extra.trained, **full_copies(holding)}
    write_extra(parameters, {**extra.overwritten, **extra.base})
    extra.overwritten = {}


def put_on_extra(model: nn.Module, record: Record, factors: Mapping[str, float]) -> None:
    """Write the extra weights of the adapters that become active. No adapter may be active."""
    extra = record.extra
    values = {
        name: value
        for adapter in factors
        if adapter != record.trainable
        for name, value in record.loaded[adapter].extra_weights.items()
    }
    trained = extra.trained if factors.get(cast(str, record.trainable)) == 1 else {}
    if values or trained:
        parameters = dict(model.named_parameters())
        extra.overwritten = full_copies({name: parameters[name] for name in values})
        write_extra(parameters, {**values, **trained})
    if record.trainable in factors:
        extra.trained = {}


def check_can_put_on_extra(model: nn.Module, record: Record, factors: Mapping[str, float]) -> None:
    """Raise ValueError if an extra weight would be scaled, or two adapters have the same one."""
    names = {
        adapter: extra_parameters(model, record)
        if adapter == record.trainable
        else record.loaded[adapter].extra_weights
        for adapter in factors
    }
    check_extra_apart(
        ((adapter, weight, names[adapter]) for adapter, weight in factors.items()),
        "the model can hold one: make one of them active",
    )


def write_extra(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give parameters whole values by name. Every rank of a sharded model must call this."""
    for name, value in values.items():
        parameter = parameters[name]
        give_own_memory(parameter)
        if full_shape(parameter) != value.shape:
            raise ValueError(
                f"{name} has another shape than when it was recorded: give it that one again, and call s2ft.detach "
                "before resize_token_embeddings"
            )
        if is_spread(parameter) or has_master_copy(parameter):
            write_units(parameter, torch.arange(value.shape[0], device="cpu"), value, 0)
        else:
            parameter.detach().copy_(value)


# ---- extra weights: saving and loading -----------------------------------------------------------------


def extra_values(model: nn.Module, record: Record, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return copies of the trainable adapter's extra weights, by name.

    Args:
        model: The model. If it is sharded, every rank must call this.
        record: Its record.
        state: A gathered state_dict that has them. Default: the model's parameters.

    Raises:
        ValueError: The state lacks an extra weight, or has a shard of one.
    """
    parameters, aside = extra_parameters(model, record), record.extra.trained
    left = {name: parameter for name, parameter in parameters.items() if name not in aside}
    state = full_tensors(left) if state is None else state
    for name, parameter in left.items():
        if name not in state:
            raise ValueError(f"the state given to save has no {name}, which is trained")
        shape = full_shape(parameter)
        if state[name].shape != shape:
            raise ValueError(
                f"the state given to save has {name} of shape {tuple(state[name].shape)}, not {tuple(shape)}: "
                "give a state that was gathered"
            )
    return {name: (state[name] if name in left else aside[name]).detach().clone() for name in parameters}


def set_trained(
    model: nn.Module, record: Record, deltas: dict[str, Delta], extra_weights: Mapping[str, Tensor]
) -> None:
    """Give the trainable adapter the values of a saved one of the same selection. Every rank must call this.

    Raises:
        ValueError: It has other extra weights than this model trains. Nothing has changed.
    """
    ours = extra_parameters(model, record)
    more, less = sorted(extra_weights.keys() - ours.keys()), sorted(ours.keys() - extra_weights.keys())
    refuse(
        (
            more,
            f"the adapter to load has {', '.join(more)} trained in full, which is frozen in this model: name the "
            "module in modules_to_save, or set its requires_grad, as in the run that saved it",
        ),
        (
            less,
            f"this model trains {', '.join(less)} in full, which the adapter to load does not have: freeze it, as in "
            "the run that saved the adapter",
        ),
    )
    reshard_all(model)
    set_mounted_deltas(record, deltas)
    set_extra(model, record, extra_weights)


def set_extra(model: nn.Module, record: Record, values: Mapping[str, Tensor]) -> None:
    """Give the trainable adapter these extra weights, after the values before training are recorded."""
    if not values:
        return
    keep_base_of_unfrozen(model, record)
    if record.awaits_weights:
        record.extra.arriving = {name: value.clone() for name, value in values.items()}
        return
    if record.extra.trained:  # the adapter is not active
        record.extra.trained = {**record.extra.trained, **{name: value.clone() for name, value in values.items()}}
        return
    write_extra(dict(model.named_parameters()), values)
