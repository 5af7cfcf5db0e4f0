"""Active adapters of a model: writing them into the weights, restoring the base, and reading trained deltas.

Before a weight is written, the slices that will change are recorded with the values they hold (write-ahead). Restoring
copies the recorded values back. It can be done any number of times, so an interrupt at any moment loses nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from s2ft.attached import extra_weights
from s2ft.attached.checks import check_can_write, check_can_write_now, check_has_arrived
from s2ft.attached.holding import write_slices
from s2ft.attached.record import Attachment, Mount, Written
from s2ft.config import S2FTConfig
from s2ft.distributed import full_tensors, has_master_copy, is_sharded, reshard_all, write_units
from s2ft.model.coupling import Projection
from s2ft.model.delta import Delta
from s2ft.model.weights import weight_at
from s2ft.ops import scatter_add_, swap_
from s2ft.ops._memory import WRITING, check_private
from s2ft.selection.selection import unit_tensors

# ---- which adapters are active -------------------------------------------------------------------------


def switch(model: nn.Module, record: Attachment, weights: dict[str, float]) -> None:
    """Make these adapters active in place of those that are.

    Args:
        model: Model of the record.
        record: Record that has the adapters.
        weights: Weights by adapter; empty for the base.

    Raises:
        ValueError: An adapter can't be written; nothing has changed.
    """
    trainable_is_written = weights.get(record.name, 1) != 1
    if weights == record.active and not trainable_is_written and not record.change_unfinished:
        return  # if the trainable adapter is written, its values may have changed since
    reshard_all(model)
    extra_weights.check_can_put_on(model, record, weights)
    names = [name for name in weights if name != record.name or trainable_is_written]
    if names:
        check_can_write_now(model, record)
    place_loaded(model, record, [name for name in names if name != record.name and _has_moved(model, record, name)])
    trained = None
    if record.name in names:  # loaded adapters were checked when they were loaded
        trained = mounted_deltas(record)
        check_can_write(model, record, trained)
    with WRITING:
        deactivate(model, record)
        activate(model, record, weights, trained)


def deactivate(model: nn.Module, record: Attachment) -> None:
    """Make no adapter active: the weights hold the base, bit for bit."""
    try:
        _restore_base(model, record)
    except BaseException:  # an interrupt: finish what it cut short
        _restore_base(model, record)
        raise


def _restore_base(model: nn.Module, record: Attachment) -> None:
    record.change_unfinished, record.active = True, {}
    reshard_all(model)
    extra_weights.take_off(model, record)
    for move in record.moves:
        move.recover(model)
    for mounted in record.mounts.values():
        mounted.layer.unfuse()
        mounted.layer.enabled = False
    for entry in reversed(record.written):
        with weight_at(model, entry.projection).shard() as part:
            index, base, is_checked = entry.index, entry.base, False
            if entry.delta is not None and part.is_full:
                index, is_checked = record.positions_of(entry.projection, entry.delta, part.tensor), True
            elif not entry.is_local:  # it was written before the model was sharded, if it is sharded
                index = record.current_positions(entry.projection, index)
                index, base = part.restrict(index, base, entry.projection.dim)
            if base.numel():
                # A copy, which swap_ fills with the values that it replaces: the recorded values must stay.
                base = base.to(device=part.tensor.device, dtype=part.tensor.dtype, copy=True)
                index = index.to(part.tensor.device)
                swap_(part.tensor, index, base, entry.projection.dim, is_checked=is_checked)
    record.written.clear()
    record.change_unfinished = False


def activate(
    model: nn.Module, record: Attachment, weights: dict[str, float], trained: dict[str, Delta] | None = None
) -> None:
    """Make these adapters active. Their weighted sum is written into the model in one pass.

    A trainable adapter of weight 1 is written by its layers, on top of the others.

    Args:
        model: Model with the base in its weights and no active adapter.
        record: Record of the model.
        weights: Weights by adapter.
        trained: Deltas of the trainable adapter by projection, if it has another weight.

    Raises:
        Exception: Any failure, after which no adapter is active.
    """
    trains = weights.get(record.name) == 1
    written = {name: weight for name, weight in weights.items() if not (trains and name == record.name)}
    try:
        record.change_unfinished = True
        deltas = {name: trained if name == record.name else record.loaded[name].deltas for name in written}
        for path in dict.fromkeys(path for name in written for path in deltas[name]):
            parts = [(deltas[name][path], weight) for name, weight in written.items() if path in deltas[name]]
            write(model, record, record.projections[path], parts)
        extra_weights.put_on(model, record, weights)
        for mounted in record.mounts.values():
            mounted.layer.enabled = trains
        record.active = dict(weights)
        write_slices(model, record)
        record.change_unfinished = False
    except BaseException:
        deactivate(model, record)
        raise


def write(model: nn.Module, record: Attachment, projection: Projection, parts: list[tuple[Delta, float]]) -> None:
    """Add a weighted sum of deltas to a weight. What it overwrites is recorded first, for :func:`deactivate`."""
    with weight_at(model, projection).shard() as part:
        weight, dim = part.tensor, projection.dim
        if part.is_full:
            found = [(record.positions_of(projection, delta, weight), delta.values) for delta, _ in parts]
        else:
            places = [record.current_positions(projection, delta.index) for delta, _ in parts]
            found = [part.restrict(place, delta.values, dim) for place, (delta, _) in zip(places, parts)]
        index, values = ([one[i].to(weight.device) for one in found] for i in (0, 1))
        with WRITING:
            bases = [weight.index_select(dim, one) for one in index]
        for (delta, _), here, base in zip(parts, index, bases):
            of_whole = (delta.index, base, False, delta)
            record.written.append(Written(projection, *(of_whole if part.is_full else (here, base, True))))
        if weight.numel():  # else all of it is on other ranks
            check_private(projection.path, weight)
            factors = [factor for _, factor in parts]
            scatter_add_(weight, index, values, dim, factors, is_checked=part.is_full)


def _has_moved(model: nn.Module, record: Attachment, name: str) -> bool:
    """Whether the weights of a loaded adapter are not where its tensors are, judged by the first of them."""
    path, delta = next(iter(record.loaded[name].deltas.items()))
    return delta.values.device != weight_at(model, record.projections[path]).tensor.device


def place_loaded(model: nn.Module, record: Attachment, names: Iterable[str]) -> None:
    """Make loaded adapters ready, so that a switch sends nothing to a device and waits for nothing.

    Their units are checked. Their tensors go to the devices of the weights, unless an adapter was loaded with a device
    of its own, or the weights are on the meta device.

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
        record.place(name, devices)
        for path, delta in record.loaded[name].deltas.items():
            if not is_sharded(handles[path].tensor):
                record.positions_of(record.projections[path], delta, handles[path].matrix)


# ---- deltas of the trainable adapter -------------------------------------------------------------------


def mounted_deltas(record: Attachment, state: Mapping[str, Tensor] | None = None) -> dict[str, Delta]:
    """Return copies of the trainable adapter's deltas, by projection, in the base's order.

    Args:
        record: Record of the model.
        state: A gathered state_dict that has every s2. Default: the layers' own s2, which are gathered if they are
            spread over ranks; every one of these ranks must call this.

    Raises:
        ValueError: The state lacks an s2, or has a shard of one, or the weights have not arrived.
        RuntimeError: A rank did not take part within ten minutes.
    """
    check_has_arrived(record)
    slices = full_tensors(record.slices) if state is None else state
    for path, mount in record.mounts.items():
        _check_is_whole(f"{path}.s2", mount, slices)
    deltas = {}
    for name, (mount, part) in record.parts.items():
        s2, dim = slices[f"{part.projection.path}.s2"].detach(), mount.layer.dim
        values = s2.index_select(dim, part.positions.to(s2.device))
        if has_master_copy(mount.layer.s2):  # the optimizer's copy is float32
            values = values.to(record.config.delta_dtype_for(mount.layer.s2.dtype))
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


def set_mounted_deltas(record: Attachment, deltas: dict[str, Delta]) -> None:
    """Copy deltas of the same selection into the trainable layers. Every rank with a shard of them must call this."""
    for name, delta in deltas.items():
        mount, part = record.parts[name]
        write_units(mount.layer.s2, part.positions, delta.values, delta.dim)


# ---- a trainable adapter on top of the active ones, on units that none of them trains -------------------------

ON_TOP_OF = "on_top_of"  # key in the info of an adapter: weights by name of the adapters that it was trained on top of


def apart_from_active(record: Attachment, config: S2FTConfig) -> S2FTConfig:
    """Return a config that chooses no unit that an active adapter trains.

    Args:
        record: Record of a model without a trainable adapter.
        config: Config of the new adapter.

    Returns:
        A copy of the config, with the units of the active adapters in its `exclude`.

    Raises:
        ValueError: The config's `units` name a unit that an active adapter trains.
    """
    if config.units is not None:
        _check_apart(record, unit_tensors(config.units, "units"))
        return config
    taken = [unit_tensors(config.exclude, "exclude")] if config.exclude is not None else []
    taken += [record.loaded[name].selection.units for name in record.active]
    paths = dict.fromkeys(path for units in taken for path in units)
    return replace(
        config, exclude={path: torch.cat([units[path] for units in taken if path in units]).unique() for path in paths}
    )


def _check_apart(record: Attachment, units: dict[str, Tensor]) -> None:
    for name in record.active:
        theirs = record.loaded[name].selection.units
        for path in units.keys() & theirs.keys():
            shared = units[path][torch.isin(units[path], theirs[path])]
            if shared.numel():
                raise ValueError(
                    f"units names {shared.numel()} of {path} that the active adapter {name!r} trains, such as "
                    f"{int(shared[0])}: with on_top=True choose others, or let the ratios and exclude choose"
                )
