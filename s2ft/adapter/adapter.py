"""An adapter: named deltas in original coordinates, with what is needed to put them on the right model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.attached import extra
from s2ft.attached.record import Attachment
from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling, projections_of
from s2ft.model.delta import Delta
from s2ft.model.fingerprint import difference
from s2ft.model.weights import weight_at
from s2ft.selection import Selection


@dataclass
class Adapter:
    """Named deltas with what is needed to put them on the right model.

    Args:
        name: its name in a model.
        config: what was trained.
        selection: in units.
        fingerprint: of the base.
        deltas: by projection.
        info: free metadata, JSON values.
        couplings: where they were given by hand.
        extra_weights: parameters that are trained whole, by name.
    """

    name: str
    config: S2FTConfig
    selection: Selection
    fingerprint: dict[str, Any]
    deltas: dict[str, Delta]
    info: dict[str, Any] = field(default_factory=dict)
    couplings: list[Coupling] | None = None
    extra_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Trained numbers, the extra weights' too."""
        return sum(delta.values.numel() for delta in self.deltas.values()) + sum(
            value.numel() for value in self.extra_weights.values()
        )

    def to(self, device) -> "Adapter":
        """With the deltas and extra weights on `device`."""
        return replace(
            self,
            deltas={
                path: Delta(delta.dim, delta.index, delta.values.to(device)) for path, delta in self.deltas.items()
            },
            extra_weights={name: value.to(device) for name, value in self.extra_weights.items()},
        )

    def __add__(self, other: "Adapter") -> "Adapter":
        return weighted_sum([(self, 1.0), (other, 1.0)], f"{self.name}+{other.name}")

    def __sub__(self, other: "Adapter") -> "Adapter":
        return weighted_sum([(self, 1.0), (other, -1.0)], f"{self.name}-{other.name}")

    def __mul__(self, weight: float) -> "Adapter":
        return weighted_sum([(self, weight)], self.name)

    __rmul__ = __mul__

    def __neg__(self) -> "Adapter":
        return self * -1.0


# ---- weighted sums (paper, section 3.4) --------------------------------------------------------------------


def weighted_sum(parts: Sequence[tuple[Adapter, float]], name: str) -> Adapter:
    """The adapter whose deltas are the sum of weight × delta, on the units that any of `parts` has.

    Where selections are disjoint and the weights are 1 every number is one that was there before, so that nothing is
    lost. Sums are formed in float32, or in float64 where a delta is. Its config names the units.

    Extra weights are values and no updates: those of one adapter of weight 1 pass through.

    Raises: ValueError for adapters of different bases, a weight that is not a finite number, or extra weights that two
        of them have or that would be scaled.
    """
    if not parts:
        raise ValueError("there is nothing to add up: give at least one adapter")
    first = parts[0][0]
    for adapter, weight in parts:
        check_weight(adapter.name, weight)
        other_base = difference(first.fingerprint, adapter.fingerprint)
        if other_base:
            raise ValueError(f"adapters {first.name!r} and {adapter.name!r} are of different bases: {other_base}")
    paths = dict.fromkeys(path for adapter, _ in parts for path in adapter.deltas)
    deltas = {
        path: sum_deltas([(adapter.deltas[path], float(weight)) for adapter, weight in parts if path in adapter.deltas])
        for path in paths
    }
    selection = Selection(
        {
            path: torch.cat([adapter.selection[path] for adapter, _ in parts if path in adapter.deltas]).unique()
            for path in paths
        }
    )
    extra_weights = _extra_of_sum(parts)
    modules = [name for adapter, _ in parts for name in adapter.config.modules_to_save or ()]
    config = S2FTConfig(
        units=selection,
        layout=first.config.layout,
        delta_dtype=first.config.delta_dtype,
        ffn_kernel=first.config.ffn_kernel,
        modules_to_save=modules or None,
    )
    info = {**first.info, "sum_of": [[adapter.name, float(weight)] for adapter, weight in parts]}
    return Adapter(name, config, selection, first.fingerprint, deltas, info, first.couplings, extra_weights)


def _extra_of_sum(parts: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    owners: dict[str, Adapter] = {}
    for adapter, weight in parts:
        for name in adapter.extra_weights:
            if weight != 1:
                raise ValueError(
                    f"adapter {adapter.name!r} has {name} trained whole, which can't be scaled: give the "
                    f"adapter weight 1, not {weight:g}"
                )
            if name in owners:
                raise ValueError(
                    f"adapters {owners[name].name!r} and {adapter.name!r} both have {name} trained whole, "
                    "and values of it don't add up: keep them apart and switch between them"
                )
            owners[name] = adapter
    return {name: adapter.extra_weights[name].clone() for name, adapter in owners.items()}


def check_weight(name: str, weight: Any) -> None:
    """Raises: ValueError for what is not a finite number."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"the weight of adapter {name!r} must be a finite number, got {weight!r}")


def sum_deltas(parts: list[tuple[Delta, float]]) -> Delta:
    """The sum of weight × delta of one module, on the units that any of them has; gradients flow to the values. In
    float32, or in float64 where a delta is; a single delta of weight 1 stays as it is, copied."""
    if len(parts) == 1 and parts[0][1] == 1:
        delta = parts[0][0]
        return Delta(delta.dim, delta.index.clone(), delta.values.clone())
    dim, wide = parts[0][0].dim, torch.float32
    for delta, _ in parts:
        wide = torch.promote_types(wide, delta.values.dtype)
    index = torch.cat([delta.index for delta, _ in parts]).unique()
    shape = list(parts[0][0].values.shape)
    shape[dim] = index.numel()
    total = torch.zeros(shape, dtype=wide, device=parts[0][0].values.device)
    for delta, weight in parts:
        place = torch.searchsorted(index, delta.index).to(total.device)
        total.index_add_(dim, place, delta.values.to(total) * weight)
    return Delta(dim, index, total)


# ---- does it fit a model -------------------------------------------------------------------------------------


def check_fits(adapter: Adapter, model: nn.Module, record: Attachment) -> None:
    """Raises: ValueError naming what does not fit, where `adapter` is not one of this model's."""
    known = {projection.name: projection for projection in projections_of(record.couplings)}
    for path, delta in adapter.deltas.items():
        if path not in known:
            raise ValueError(f"adapter {adapter.name!r} is for another model: this one has no projection {path}")
        shape = list(weight_at(model, known[path]).shape)
        size, shape[delta.dim] = shape[delta.dim], delta.index.numel()
        if delta.dim != known[path].dim or shape != list(delta.values.shape):
            raise ValueError(
                f"adapter {adapter.name!r} is for another model: {path}.delta has shape "
                f"{tuple(delta.values.shape)} for dim {delta.dim}, this model asks for dim "
                f"{known[path].dim} and shape {tuple(shape)}"
            )
        if int(delta.index.max()) >= size:
            raise ValueError(
                f"adapter {adapter.name!r}: {path}.index has {int(delta.index.max())}, "
                f"outside the weight's 0..{size - 1}"
            )
    other_base = difference(record.fingerprint, adapter.fingerprint)
    if other_base:
        raise ValueError(f"adapter {adapter.name!r} was trained on another base: {other_base}")
    extra.check_fits(model, record, adapter.name, adapter.extra_weights)
    for path, delta in adapter.deltas.items():
        _check_whole_units(adapter, known[path], delta)


def _check_whole_units(adapter: Adapter, projection, delta: Delta) -> None:
    last = int(adapter.selection[projection.name].max())
    if last >= projection.count:  # in a weight of several projections the element may be another's
        raise ValueError(
            f"adapter {adapter.name!r}: {projection.name} has {projection.count} units, from 0; there is no {last}"
        )
    if not torch.equal(projection.elements(adapter.selection[projection.name]), delta.index):
        raise ValueError(
            f"adapter {adapter.name!r}: {projection.name}.index does not name the selected units, "
            f"each of {projection.unit} elements"
        )
