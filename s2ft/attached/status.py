"""Which adapters a model has, what is active, and what is trainable, as a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import nn

from s2ft.attached.extra_weights import trained_parameters
from s2ft.attached.hosts.wrappers import of_compiled
from s2ft.attached.record import Attachment, State, find_attachment
from s2ft.attached.report import units_of
from s2ft.files.tables import table

FLAGS = ("active", "trainable")


@dataclass(frozen=True)
class StatusRow:
    """One projection of one layer under one adapter.

    Attributes:
        path: Name of the projection.
        adapter: Name of the adapter.
        units: Selected units, for example "46 of 1536 channels", as in the report of :func:`s2ft.attach`.
        elements: Selected rows or columns of the weight.
        weight: Weight of the adapter in the active sum; 0 if it is not active.
        trainable: Whether the slice requires a gradient.
    """

    path: str
    adapter: str
    units: str
    elements: int
    weight: float
    trainable: bool

    @property
    def active(self) -> bool:
        """Whether the adapter is part of the active sum."""
        return self.weight != 0

    @property
    def flags(self) -> str:
        """The words active and trainable, as far as they hold."""
        return ", ".join(flag for flag in FLAGS if getattr(self, flag))


@dataclass(frozen=True)
class Status:
    """The adapters of a model; prints as a table with one line an adapter.

    Attributes:
        adapters: Names of all adapters, the trainable one first.
        active: Weights of the active adapters by name; empty if the model computes the base.
        trainable: Name of the adapter whose slices require a gradient, or None.
        rows: One row for each projection of each adapter.
        state: What the model computes: base, written or training.
        parameters: Trained parameters by adapter, with its extra weights.
    """

    adapters: list[str]
    active: dict[str, float]
    trainable: str | None
    rows: list[StatusRow]
    state: State
    parameters: dict[str, int]

    def __str__(self) -> str:
        active = ", ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in self.active.items())
        title = (
            f"adapters: {len(self.adapters)}; active: {active or 'none'}; trainable: {self.trainable or 'none'}; "
            f"state: {self.state.value}"
        )
        if not self.adapters:
            return title
        lines = [("adapter", "projections", "units", "parameters", "flags")]
        lines += [self._line(name) for name in self.adapters]
        return f"{title}\n{table(lines, right={1, 3})}"

    def _line(self, name: str) -> tuple[str, ...]:
        """One adapter: name, projections, units of each kind of projection, parameters, flags."""
        rows = [row for row in self.rows if row.adapter == name]
        units: dict[str, int] = {}
        for row in rows:
            units[row.units] = units.get(row.units, 0) + 1
        shown = [f"{count} × {text}" for text, count in list(units.items())[:2]]
        more = [f"and {len(units) - 2} more"] if len(units) > 2 else []
        flags = next((row.flags for row in rows), "")
        return name, str(len(rows)), ", ".join(shown + more), f"{self.parameters[name]:,}", flags

    @property
    def details(self) -> str:
        """A table with one line for each projection of each adapter."""
        lines = [("projection", "adapter", "units", "flags")]
        lines += [(row.path, row.adapter, row.units, row.flags) for row in self.rows]
        return table(lines)


@of_compiled
def status(model: nn.Module) -> Status:
    """Return the adapters of a model, with one row for each projection of each adapter.

    Args:
        model: Any model. One without adapters has an empty status.

    Returns:
        The status. It prints as a table with one line an adapter; its `details` list every projection.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> print(s2ft.status(model))
        adapters: 1; active: math; trainable: math; state: training
        adapter  projections  units                   parameters  flags
        math               2  2 × 13 of 128 channels       1,664  active, trainable
    """
    record = find_attachment(model)
    if record is None:
        return Status([], {}, None, [], State.BASE, {})
    trains = any(mount.layer.s2.requires_grad for mount in record.mounts.values())
    parameters = {name: adapter.parameters for name, adapter in record.loaded.items()}
    if record.name is not None:
        extra = trained_parameters(model, record).values()
        shapes = [getattr(tensor, "ds_shape", tensor.shape) for tensor in (*record.slices.values(), *extra)]
        parameters[record.name] = sum(map(prod, shapes))  # the whole shape, also where ZeRO-3 holds a shard
    return Status(
        record.names,
        dict(record.active),
        record.name if trains else None,
        [*_trainable_rows(record), *_loaded_rows(record)],
        record.state,
        parameters,
    )


def _trainable_rows(record: Attachment) -> Iterator[StatusRow]:
    weight = record.active.get(record.name, 0.0)
    for path, (mount, part) in record.parts.items():
        units = units_of(part.projection, record.selection[path].numel())
        yield StatusRow(path, record.name, units, part.elements.numel(), weight, mount.layer.s2.requires_grad)


def _loaded_rows(record: Attachment) -> Iterator[StatusRow]:
    for name, adapter in record.loaded.items():
        weight = record.active.get(name, 0.0)
        for path, delta in adapter.deltas.items():
            units = units_of(record.projections[path], adapter.selection[path].numel())
            yield StatusRow(path, name, units, delta.index.numel(), weight, False)
