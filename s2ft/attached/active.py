"""Which adapters are in a model's weights: putting them in, taking them off, and reading what the trainable one learned.

Before a weight is written, the units that will change are recorded with what they hold (write-ahead). Restoring copies
the recorded values back. It can be done any number of times, so an interrupt at any moment costs nothing.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from s2ft.attached import extra
from s2ft.attached.record import Attachment, Mount, Written
from s2ft.distributed import full_tensors, has_master_copy, reshard_all, write_units
from s2ft.model.coupling import Projection, projections_of
from s2ft.model.delta import Delta
from s2ft.model.weights import weight_at
from s2ft.ops import scatter_add_, swap_
from s2ft.ops._lock import LOCK, finish_interrupted
from s2ft.ops._memory import check_private


def take_off(model: nn.Module, record: Attachment) -> None:
    """Make no adapter active; the weights hold the base, bit for bit."""
    try:
        _restore_base(model, record)
    except BaseException:  # an interrupt: no half of it stays
        _restore_base(model, record)
        raise


def _restore_base(model: nn.Module, record: Attachment) -> None:
    record.changing, record.active = True, {}
    reshard_all(model)
    extra.take_off(model, record)
    for move in record.moves:
        move.recover(model)
    for mounted in record.mounts.values():
        mounted.layer.unfuse()
        mounted.layer.enabled = False
    for entry in reversed(record.written):
        with weight_at(model, entry.projection).shard() as part:
            index, base = entry.index, entry.base
            if not entry.is_local:  # written before the model was sharded, if it is
                index, base = part.restrict(record.places(entry.projection, index), base, entry.projection.dim)
            if base.numel():
                # a copy, which swap_ fills with what it replaces: the recorded values must stay
                base = base.to(device=part.tensor.device, dtype=part.tensor.dtype, copy=True)
                swap_(part.tensor, index.to(part.tensor.device), base, entry.projection.dim)
    record.written.clear()
    record.changing = False


def put_on(
    model: nn.Module, record: Attachment, weights: dict[str, float], deltas: dict[str, dict[str, Delta]]
) -> None:
    """Make these adapters active; nothing else may be. Their weighted sum is written into the model in one pass.

    The trainable one, where its weight is 1, is added in the forward instead.

    Args:
        model: with the base in its weights.
        record: of the model.
        weights: by adapter.
        deltas: by adapter, of all that are written.

    Raises:
        Exception: whatever fails, with no adapter active.
    """
    trains = weights.get(record.name) == 1
    written = {name: weight for name, weight in weights.items() if not (trains and name == record.name)}
    try:
        record.changing = True
        for path in dict.fromkeys(path for name in written for path in deltas[name]):
            parts = [(deltas[name][path], weight) for name, weight in written.items() if path in deltas[name]]
            _write(model, record, record.projections[path], parts)
        extra.put_on(model, record, weights)
        for mounted in record.mounts.values():
            mounted.layer.enabled = trains
        record.active = dict(weights)
        record.changing = False
    except BaseException:
        take_off(model, record)
        raise


def write_trained(model: nn.Module, record: Attachment) -> None:
    """Write the trainable adapter, which is added in the forward, into the weights on top of what is written there.

    The weights are, bit for bit, those that the forward multiplied by.
    """
    for name, delta in mounted_deltas(record).items():
        _write(model, record, record.projections[name], [(delta, 1.0)])
    for mounted in record.mounts.values():
        mounted.layer.enabled = False


def _write(model: nn.Module, record: Attachment, projection: Projection, parts: list[tuple[Delta, float]]) -> None:
    with weight_at(model, projection).shard() as part:
        weight = part.tensor
        found = [
            part.restrict(record.places(projection, delta.index), delta.values, projection.dim) for delta, _ in parts
        ]
        index, values = ([one[i].to(weight.device) for one in found] for i in (0, 1))
        with LOCK:
            finish_interrupted()
            bases = [weight.index_select(projection.dim, one) for one in index]
        for (delta, _), here, base in zip(parts, index, bases):
            record.written.append(Written(projection, delta.index if part.is_full else here, base, not part.is_full))
        if weight.numel():  # else all of it is on other ranks
            check_private(projection.path, weight)
            scatter_add_(weight, index, values, projection.dim, [weight for _, weight in parts])


def check_can_write(model: nn.Module, record: Attachment, deltas: dict[str, Delta]) -> None:
    """Raises: ValueError where a weight that the deltas would change is quantized."""
    for projection in projections_of(record.couplings):
        if projection.name in deltas and weight_at(model, projection).read_only:
            raise ValueError(
                f"{projection.path} is quantized, and an adapter can't be written into it: load it with "
                "trainable=True, which adds it in the forward, or load the base unquantized"
            )


# ---- what the trainable one learned --------------------------------------------------------------------


def mounted_deltas(record: Attachment, state: Mapping[str, Tensor] | None = None) -> dict[str, Delta]:
    """The trainable adapter's deltas in original coordinates, copied.

    Args: state: a state_dict to take every s2 from; default: the layers' own, gathered where they are spread over
        ranks, for which all of those must call this.
    Raises: ValueError where it lacks one, or one is not whole; RuntimeError where a rank does not come.
    """
    slices = full_tensors(record.slices) if state is None else state
    for path, mount in record.mounts.items():
        _check_is_whole(f"{path}.s2", mount, slices)
    deltas = {}
    for name, (mount, part) in record.parts.items():
        s2, dim = slices[f"{part.projection.path}.s2"].detach(), mount.layer.dim
        values = s2.index_select(dim, part.positions.to(s2.device))
        if has_master_copy(mount.layer.s2):  # an optimizer's are float32
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
            f"{key} has shape {tuple(shape)} here, not {expected} {('rows', 'columns')[dim]}: it is a "
            "part of what is trained, so nothing is saved. FSDP2 and ZeRO-3 are gathered by themselves; under "
            "FSDP version 1 do this in FullyShardedDataParallel.summon_full_params(model, "
            "writeback=False), else give a state that was gathered"
        )


def set_mounted_deltas(record: Attachment, deltas: dict[str, Delta]) -> None:
    """Copy deltas of the same selection into the trainable layers, on every rank that has a part of them."""
    for name, delta in deltas.items():
        mount, part = record.parts[name]
        write_units(mount.layer.s2, part.positions, delta.values, delta.dim)
