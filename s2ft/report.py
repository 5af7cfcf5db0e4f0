"""What is trained, as a table."""
from dataclasses import dataclass
from typing import Dict, List, Tuple

import torch
from torch import nn

from s2ft.compiled import of_compiled
from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.record import attachment_of
from s2ft.selection import Selection
from s2ft.selection.budget import unit_parameters
from s2ft.selection.selection import span
from s2ft.weights import parameters_of, weight_of


@dataclass(frozen=True)
class Trained:
    """What is trained of one projection of one layer."""

    projection: Projection
    units: int
    parameters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """What is trained of one projection over all layers."""

    projection: str
    layers: int
    units: str        # e.g. "46 of 1536 channels"
    parameters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Report:
    """What attach did, or would do; prints as a table."""

    name: str
    layout: str
    rows: List[Row]
    trainable: int
    total: int        # parameters of the base model

    @classmethod
    def of(cls, model: nn.Module) -> "Report":
        """What is trained of a model with an adapter attached, read from the layers themselves."""
        record = attachment_of(model)
        parts = [Trained(part.projection, part.elements.numel() // part.projection.unit,
                         mount.layer.s2.numel() // mount.layer.s2.shape[mount.layer.dim] * part.elements.numel(),
                         mount.layer.s2.dtype) for mount, part in record.parts.values()]
        total = parameters_of(model) - sum(part.parameters for part in parts)
        return cls._from(record.name, record.config, parts, total)

    @classmethod
    def planned(cls, model: nn.Module, couplings: List[Coupling], config: S2FTConfig, selection: Selection) -> "Report":
        """What would be trained of the untouched model, whose weights are not looked at."""
        parts = []
        for projection in projections_of(couplings):
            if projection.name in selection:
                units = selection[projection.name].numel()
                parts.append(Trained(projection, units, units * unit_parameters(model, projection),
                                     config.delta_dtype_for(weight_of(model, projection).dtype)))
        return cls._from("planned", config, parts, parameters_of(model))

    @classmethod
    def _from(cls, name: str, config: S2FTConfig, parts: List[Trained], total: int) -> "Report":
        groups: Dict[Tuple, List[Trained]] = {}
        for part in parts:
            alike = (_name_in_layer(part.projection), part.projection.key, part.projection.count, part.units)
            groups.setdefault(alike, []).append(part)
        rows = [Row(shown, *_spread(group), sum(part.parameters for part in group), group[0].dtype)
                for (shown, *_), group in groups.items()]
        return cls(name, config.layout, rows, sum(row.parameters for row in rows), total)

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def __str__(self) -> str:
        width = max(12, *(len(row.projection) + 1 for row in self.rows))
        lines = [f"{'projection':<{width}}{'layers':>7}  {'units a layer':<24}{'parameters':>14}  dtype"]
        lines += [f"{row.projection:<{width}}{row.layers:>7}  {row.units:<24}{row.parameters:>14,}  "
                  f"{str(row.dtype).removeprefix('torch.')}" for row in self.rows]
        return "\n".join(lines + [f"adapter {self.name!r}, layout {self.layout}: {self.trainable:,} of "
                                  f"{self.total:,} parameters are trained ({self.share:.2%})"])


def units_of(projection: Projection, units: int) -> str:
    """E.g. "46 of 1536 channels"."""
    return f"{units} of {projection.count} {unit_name(projection)}"


def _spread(group: List[Trained]) -> Tuple[int, str]:
    """Over how many layers, or weights where there are no experts, and how many units in each."""
    one = group[0]
    text = units_of(one.projection, one.units)
    if one.projection.expert is None:
        return len(group), text
    layers = len({part.projection.path for part in group})
    experts = [sum(part.projection.path == path for part in group) for path in {p.projection.path for p in group}]
    return layers, f"{text}, {span(experts)} experts"


def _name_in_layer(projection: Projection) -> str:
    """The part of the name that all layers have in common: what follows the path's last number, if anything does."""
    names = projection.path.split(".")
    numbers = [i for i, name in enumerate(names[:-1]) if name.isdigit()]
    shown = projection.path if names[-1].isdigit() or not numbers else ".".join(names[numbers[-1] + 1:])
    return shown if projection.size is None else f"{shown}.{projection.key}"


@of_compiled
def print_trainable_parameters(model: nn.Module) -> None:
    """One line, as PEFT's models print it, with the numbers of the report: trained slices are part of the base's weights,
    so that they are not counted again."""
    report = Report.of(model)
    print(f"trainable params: {report.trainable:,} || all params: {report.total:,} || trainable%: "
          f"{100 * report.share:.4f}")
