"""An adapter: named deltas in original coordinates, with what is needed to put them on the right model."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
from torch import nn

from s2ft.config import S2FTConfig
from s2ft.mounting import Attachment
from s2ft.coupling import Coupling, projections_of
from s2ft.delta import Delta
from s2ft.fingerprint import difference
from s2ft.selection import Selection
from s2ft.weights import shape_of


@dataclass
class Adapter:
    """deltas: by projection. fingerprint: of the base. selection: in units. info: free metadata.
    couplings: where they were given by hand."""

    name: str
    config: S2FTConfig
    selection: Selection
    fingerprint: Dict[str, Any]
    deltas: Dict[str, Delta]
    info: Dict[str, Any] = field(default_factory=dict)
    couplings: Optional[List[Coupling]] = None

    @property
    def parameters(self) -> int:
        return sum(delta.values.numel() for delta in self.deltas.values())


def check_fits(adapter: Adapter, model: nn.Module, record: Attachment) -> None:
    """Raises: ValueError naming what does not fit, where `adapter` is not one of this model's."""
    known = {projection.name: projection for projection in projections_of(record.couplings)}
    for path, delta in adapter.deltas.items():
        if path not in known:
            raise ValueError(f"adapter {adapter.name!r} is for another model: this one has no projection {path}")
        shape = list(shape_of(model, known[path]))
        size, shape[delta.dim] = shape[delta.dim], delta.index.numel()
        if delta.dim != known[path].dim or shape != list(delta.values.shape):
            raise ValueError(f"adapter {adapter.name!r} is for another model: {path}.delta has shape "
                             f"{tuple(delta.values.shape)} for dim {delta.dim}, this model asks for dim "
                             f"{known[path].dim} and shape {tuple(shape)}")
        if int(delta.index.max()) >= size:
            raise ValueError(f"adapter {adapter.name!r}: {path}.index has {int(delta.index.max())}, "
                             f"outside the weight's 0..{size - 1}")
    other_base = difference(record.fingerprint, adapter.fingerprint)
    if other_base:
        raise ValueError(f"adapter {adapter.name!r} was trained on another base: {other_base}")
    for path, delta in adapter.deltas.items():
        _check_whole_units(adapter, known[path], delta)


def _check_whole_units(adapter: Adapter, projection, delta: Delta) -> None:
    if not torch.equal(projection.elements(adapter.selection[projection.name]), delta.index):
        raise ValueError(f"adapter {adapter.name!r}: {projection.name}.index does not name the selected units, "
                         f"each of {projection.unit} elements")
