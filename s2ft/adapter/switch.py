"""Which adapter a model runs with, and a table that says so."""
from dataclasses import dataclass
from typing import List, Optional

from torch import nn

from s2ft.mounting import RECORD, attachment_of, put_on, take_off


def set_adapter(model: nn.Module, name: Optional[str]) -> None:
    """Make adapter `name` the active one, or none with None. The base comes back bit for bit.

    Raises: ValueError for a name that is not loaded; the model is then as it was.
    """
    record = attachment_of(model)
    if name is not None and name not in record.names:
        raise ValueError(f"no adapter is called {name!r}; there are {', '.join(record.names)}")
    if name == record.active:
        return
    take_off(model, record)
    if name is not None:
        put_on(model, record, name, {} if name == record.name else record.others[name].deltas)


@dataclass(frozen=True)
class StatusRow:
    """One projection of one layer under one adapter."""

    path: str
    adapter: str
    elements: int      # rows or columns of the weight
    active: bool
    trainable: bool
    fused: bool


@dataclass(frozen=True)
class Status:
    """What is loaded, what is active and what is trainable; prints as a table."""

    adapters: List[str]
    active: Optional[str]
    trainable: Optional[str]
    rows: List[StatusRow]

    def __str__(self) -> str:
        lines = [f"adapters: {', '.join(self.adapters) or 'none'}; active: {self.active or 'none'}; "
                 f"trainable: {self.trainable or 'none'}"]
        width = max((len(row.path) for row in self.rows), default=0)
        for row in self.rows:
            flags = [word for word in ("active", "trainable", "fused") if getattr(row, word)]
            lines.append(f"{row.path:<{width}}  {row.adapter}  {row.elements:>6}  {', '.join(flags)}")
        return "\n".join(lines)


def status(model: nn.Module) -> Status:
    """What s2ft has done to `model`, read from the layers themselves, layer by layer."""
    if RECORD not in model.__dict__:
        return Status([], None, None, [])
    record = attachment_of(model)
    rows = []
    for path, (mount, part) in record.parts.items():
        layer = mount.layer
        rows.append(StatusRow(path, record.name, part.elements.numel(), layer.enabled,
                              layer.s2.requires_grad, layer.fused))
    applied = {projection.name for projection, *_ in record.applied}
    for name, adapter in record.others.items():
        for path, delta in adapter.deltas.items():
            active = name == record.active and path in applied
            rows.append(StatusRow(path, name, delta.index.numel(), active, False, active))
    trains = any(mount.layer.s2.requires_grad for mount in record.mounts.values())
    return Status(record.names, record.active, record.name if trains else None, rows)
