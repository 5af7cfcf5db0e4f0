"""Which adapters a model runs with, and a table that says so."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Union

from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter, check_weight, weighted_sum
from s2ft.adapter.overlap import Overlap, overlap
from s2ft.api import detach, fuse
from s2ft.attached.active import check_can_write, mounted_deltas, put_on, take_off
from s2ft.attached.extra import check_can_put_on, trained_values
from s2ft.attached.hosts.compiled import of_compiled
from s2ft.attached.mounting import check_not_sharded, unmount
from s2ft.attached.record import RECORD, Attachment, attachment_of
from s2ft.attached.report import units_of
from s2ft.distributed import reshard_all
from s2ft.files.reading import check_adapter_name
from s2ft.ops._lock import LOCK

Weights = Union[str, Mapping[str, float], None]


@of_compiled
def set_adapter(model: nn.Module, adapters: Weights) -> None:
    """Make an adapter active, or several in a weighted sum, or none. The base comes back bit for bit.

    The cost does not depend on how many are loaded. The trainable adapter gets gradients where its weight is 1:
    it is added in the forward, on top of what else is active.

    Args:
        adapters: a name, weights by name such as ``{"a": 0.7, "b": 0.3}``, or None.
    Raises: ValueError for a name that is not loaded or a weight that is no finite number; the model is then as it was.
    """
    record = attachment_of(model)
    weights = _weights(record, adapters)
    trainable_is_written = weights.get(record.name, 1) != 1
    if weights == record.active and not trainable_is_written and not record.changing:
        return  # where the trainable one is written its numbers may have changed since
    reshard_all(model)
    check_can_put_on(model, record, weights)
    deltas = {name: _deltas(record, name) for name in weights if name != record.name or trainable_is_written}
    if record.name in deltas:  # those that were loaded were looked at then
        check_can_write(model, record, deltas[record.name])
    with LOCK:  # no reader of stable weights sees half of it
        take_off(model, record)
        put_on(model, record, weights, deltas)


def _weights(record: Attachment, adapters: Weights) -> dict[str, float]:
    if adapters is None:
        return {}
    weights = {adapters: 1.0} if isinstance(adapters, str) else adapters
    if not isinstance(weights, Mapping):
        raise TypeError(f"adapters must be a name, weights by name, or None, got {type(adapters).__name__}")
    for name, weight in weights.items():
        _check_known(record, name)
        check_weight(name, weight)
    return {name: float(weight) for name, weight in weights.items()}


def _check_known(record: Attachment, name: str) -> None:
    if name not in record.names:
        raise ValueError(f"no adapter is called {name!r}; there are {', '.join(record.names) or 'none'}")


def _deltas(record: Attachment, name: str):
    return mounted_deltas(record) if name == record.name else record.others[name].deltas


@of_compiled
@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit; afterwards what was active is so again, fused if it was."""
    record = attachment_of(model)
    before, fused = dict(record.active), any(mount.layer.fused for mount in record.mounts.values())
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, before)
        if fused:
            fuse(model)


@of_compiled
def get_adapter(model: nn.Module, name: str, state: Mapping[str, Tensor] | None = None) -> Adapter:
    """A loaded adapter, or the trainable one as it is now, for arithmetic: ``a + b``, ``0.5 * a``, ``-a``.

    The trainable one of a sharded model is gathered: every rank must call this.

    Args: state: a gathered state_dict that has the trainable one's numbers, instead of the model's own.
    Raises: ValueError for a name that is not loaded; RuntimeError where a rank does not come to gather.
    """
    record = attachment_of(model)
    _check_known(record, name)
    if name != record.name:
        return record.others[name]
    reshard_all(model)
    return Adapter(
        name,
        record.config,
        record.selection,
        record.fingerprint,
        mounted_deltas(record, state),
        couplings=record.couplings if record.given else None,
        extra_weights=trained_values(model, record, state),
    )


@of_compiled
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> Overlap:
    """Load the weighted sum of adapters as a new one called `name`; nothing becomes active.

    Returns: what they have in common; on disjoint units nothing is lost.
    Raises: ValueError for unknown names, weights that are no finite numbers, or a name that is taken.
    """
    record = attachment_of(model)
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"weights must be numbers by adapter, at least one, got {weights!r}")
    weights = _weights(record, weights)
    check_free(record, name)
    adapters = {part: get_adapter(model, part) for part in weights}
    record.others[name] = weighted_sum([(adapters[part], weight) for part, weight in weights.items()], name)
    return overlap(list(adapters.values()))


def check_free(record: Attachment, name: str) -> None:
    """Raises: ValueError for what can't be a name or is one already."""
    check_adapter_name(name)
    if name in record.names:
        raise ValueError(f"there is an adapter called {name!r} already: load it under another name")


def list_adapters(model: nn.Module) -> list[str]:
    """Names of all that are loaded, the trainable one first."""
    return status(model).adapters


@of_compiled
def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget an adapter; where it is active, all that is active comes off first. With the last one the model is the
    plain base, as after :func:`s2ft.detach`.

    Raises: ValueError for a name that is not loaded.
    """
    record = attachment_of(model)
    _check_known(record, name)
    if name == record.name or len(record.names) == 1:
        check_not_sharded(model, "deleting the trainable or the last adapter")
    if name in record.active:
        take_off(model, record)
    others = {other: adapter for other, adapter in record.others.items() if other != name}
    if not others and record.name in (None, name):  # the last one
        detach(model)
    elif name != record.name:
        record.others = others
    else:
        _delete_trainable(model, record)


def _delete_trainable(model: nn.Module, record: Attachment) -> None:
    """With its layers; loaded adapters stay, and are active again."""
    active = dict(record.active)
    deltas = {other: record.others[other].deltas for other in active}
    with LOCK:
        try:
            _take_layers_out(model, record)
            put_on(model, record, active, deltas)
        except BaseException:  # an interrupt: a model in between would compute something else
            _take_layers_out(model, record)
            raise


def _take_layers_out(model: nn.Module, record: Attachment) -> None:
    take_off(model, record)
    unmount(model, record)
    record.forget_mounts()
    model.requires_grad_(False)


@of_compiled
def rename_adapter(model: nn.Module, name: str, new: str) -> None:
    """Raises: ValueError for a name that is not loaded, or a new one that can't be or is taken."""
    record = attachment_of(model)
    _check_known(record, name)
    check_free(record, new)
    before = record.name, record.others, record.active
    adapters = {new if other == name else other: adapter for other, adapter in record.others.items()}
    active = {new if other == name else other: weight for other, weight in record.active.items()}
    if new in adapters:
        adapters[new] = replace(adapters[new], name=new)
    try:
        record.name, record.others, record.active = new if name == record.name else record.name, adapters, active
    except BaseException:  # an interrupt between two of the three
        record.name, record.others, record.active = before
        raise


# ---- status ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatusRow:
    """One projection of one layer under one adapter."""

    path: str
    adapter: str
    units: str  # e.g. "46 of 1536 channels", as in the report of s2ft.attach
    elements: int  # rows or columns of the weight
    weight: float  # in the sum of what is active; 0 where it is not
    trainable: bool
    fused: bool  # written into the weights

    @property
    def active(self) -> bool:
        return self.weight != 0


@dataclass(frozen=True)
class Status:
    """What is loaded, what is active and what is trainable; prints as a table."""

    adapters: list[str]
    active: dict[str, float]  # weights by name; empty where none is
    trainable: str | None
    rows: list[StatusRow]

    def __str__(self) -> str:
        active = ", ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in self.active.items())
        lines = [
            f"adapters: {', '.join(self.adapters) or 'none'}; active: {active or 'none'}; "
            f"trainable: {self.trainable or 'none'}"
        ]
        width, units = (
            max((len(getattr(row, column)) for row in self.rows), default=0) for column in ("path", "units")
        )
        for row in self.rows:
            flags = [word for word in ("active", "trainable", "fused") if getattr(row, word)]
            lines.append(f"{row.path:<{width}}  {row.adapter}  {row.units:<{units}}  {', '.join(flags)}".rstrip())
        return "\n".join(lines)


@of_compiled
def status(model: nn.Module) -> Status:
    """What s2ft has done to `model`, read from the layers themselves, layer by layer."""
    if RECORD not in model.__dict__:
        return Status([], {}, None, [])
    record = attachment_of(model)
    rows = []
    written = {entry.projection.name for entry in record.written}
    for path, (mount, part) in record.parts.items():
        layer, weight = mount.layer, record.active.get(record.name, 0.0)
        by_layer = layer.enabled if weight in (0, 1) else path in written
        units = units_of(part.projection, record.selection[path].numel())
        rows.append(
            StatusRow(
                path,
                record.name,
                units,
                part.elements.numel(),
                (weight or 1.0) if by_layer else 0.0,
                layer.s2.requires_grad,
                layer.fused or (by_layer and not layer.enabled),
            )
        )
    for name, adapter in record.others.items():
        weight = record.active.get(name, 0.0)
        for path, delta in adapter.deltas.items():
            units = units_of(record.projections[path], adapter.selection[path].numel())
            rows.append(
                StatusRow(
                    path,
                    name,
                    units,
                    delta.index.numel(),
                    weight if path in written else 0.0,
                    False,
                    weight != 0 and path in written,
                )
            )
    trains = any(mount.layer.s2.requires_grad for mount in record.mounts.values())
    return Status(record.names, dict(record.active), record.name if trains else None, rows)
