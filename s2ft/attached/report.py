"""The report of attach and the status of a model with adapters, as tables."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from s2ft.adapter.adapter import Adapter
from s2ft.attached.active import extra_parameters, parameters_to_save
from s2ft.attached.record import Record, coupled_names, find_record, on_unwrapped, record_of
from s2ft.config import TOWERS, S2FTConfig
from s2ft.distributed import full_shape
from s2ft.files.plain_text import table
from s2ft.foreign import newer_than_tested
from s2ft.model.coupling import Coupling, Projection, by_key, projections_of, unit_name
from s2ft.model.discovery import STATUSES
from s2ft.model.parts import outermost, tower_of
from s2ft.model.weights import count_parameters, weight_at
from s2ft.selection import Selection, span, unit_parameters


@dataclass(frozen=True)
class Row:
    """What is trained of one projection in all layers with the same number of units.

    Attributes:
        projection: Name of the projection within its layer.
        layers: Number of layers.
        units: Selected units in each layer, for example "46 of 1536 channels".
        parameters: Number of trained parameters in all these layers.
        dtype: Dtype of the slices.
    """

    projection: str
    layers: int
    units: str
    parameters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Report:
    """What :func:`s2ft.attach` trains or would train, or a loaded adapter has trained; prints as a table.

    Attributes:
        name: Name of the adapter.
        layout: Layout of the units, `permuted` or `indexed`.
        rows: One row for each projection and number of units.
        trainable: Number of trained parameters, with the extra weights; also of a loaded adapter.
        total: Number of parameters of the base model.
        extra_weights: Number of parameters of each extra weight, by name.
        fresh_heads: Paths of frozen modules that look new.
        towers: Whether anything is trained in a tower (language, vision, audio, projector), for towers with couplings
            or with extra weights; empty if there is one.
        couplings: Number of couplings that are movable, in place and one-sided; empty for a model of a known family.
        weights: Number of weights of the blocks by what discovery says of them: confirmed, in place, one-sided,
            untouched; empty for all other couplings.
        unproved: What :func:`s2ft.attach` could not prove on the model itself, in words; empty if nothing, or for
            verify=False.
        statistics: Paths of modules whose running statistics training mode changes.
        is_frozen: Whether the adapter was loaded to be used, not to be trained.
        untested: The installed packages that are newer than any release that s2ft was tested with, in words.
    """

    name: str
    layout: str
    rows: list[Row]
    trainable: int
    total: int
    extra_weights: dict[str, int] = field(default_factory=dict)
    fresh_heads: tuple[str, ...] = ()
    towers: dict[str, bool] = field(default_factory=dict)
    couplings: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    unproved: str = ""
    statistics: tuple[str, ...] = ()
    is_frozen: bool = False
    untested: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> "Report":
        """Make the report of a model with a trainable adapter, from its layers."""
        record = record_of(model)
        if record.trainable is None:
            raise ValueError(f"no adapter of {', '.join(record.names)} is trainable: load one with trainable=True")
        dtypes = {part.projection: mount.layer.s2.dtype for mount, part in record.parts.values()}
        rows = _rows(model, cast(Selection, record.selection), dtypes)
        in_slices = sum(row.parameters for row in rows)
        extra_weights = {
            name: full_shape(parameter).numel() for name, parameter in extra_parameters(model, record).items()
        }
        return cls(
            name=record.trainable,
            layout=cast(S2FTConfig, record.config).layout,
            rows=rows,
            trainable=in_slices + sum(extra_weights.values()),
            total=count_parameters(model) - in_slices,
            extra_weights=extra_weights,
            fresh_heads=tuple(fresh_heads(model, record)),
            towers=_towers(model, record.couplings, dtypes, extra_weights),
            couplings=_counted(coupling.status for coupling in record.custom_couplings or ()),
            weights=_counted(row.status for row in record.weight_rows),
            unproved=record.unproved,
            statistics=tuple(
                path for path, one in model.named_modules() if getattr(one, "running_mean", None) is not None
            ),
            untested=newer_than_tested(),
        )

    @classmethod
    def of_loaded(cls, model: nn.Module, adapter: Adapter) -> "Report":
        """Make the report of an adapter that was loaded into a model and is not trainable.

        Args:
            model: The model, which has the adapter.
            adapter: The adapter.
        """
        record = record_of(model)
        dtypes = {
            projection: adapter.deltas[name].values.dtype
            for name, projection in record.projections.items()
            if name in adapter.deltas
        }
        extra_weights = {name: value.numel() for name, value in adapter.extra_weights.items()}
        in_trainable_slices = sum(full_shape(mount.layer.s2).numel() for mount in record.mounts.values())
        return cls(
            name=adapter.name,
            layout=adapter.config.layout,
            rows=_rows(model, adapter.selection, dtypes),
            trainable=adapter.parameters,
            total=count_parameters(model) - in_trainable_slices,
            extra_weights=extra_weights,
            towers=_towers(model, record.couplings, dtypes, extra_weights),
            couplings=_counted(coupling.status for coupling in record.custom_couplings or ()),
            is_frozen=True,
            untested=newer_than_tested(),
        )

    @classmethod
    def planned(
        cls,
        model: nn.Module,
        couplings: list[Coupling],
        config: S2FTConfig,
        selection: Selection,
        is_custom: bool = False,
        weights: Sequence[Any] = (),
    ) -> "Report":
        """Make the report of a selection for a model without adapters. Its weights are not read.

        Args:
            model: The model.
            couplings: Its couplings.
            config: What to train.
            selection: The selected units.
            is_custom: Whether the couplings are those of no known family.
            weights: What discovery found about every weight of the blocks.
        """
        dtypes = {
            one: config.delta_dtype_for(weight_at(model, one).tensor.dtype)
            for one in projections_of(couplings)
            if one.name in selection
        }
        rows = _rows(model, selection, dtypes)
        parameters = dict(model.named_parameters())
        extra_weights = {
            name: full_shape(parameters[name]).numel()
            for name in parameters_to_save(model, couplings, config.modules_to_save)
        }
        return cls(
            name="planned",
            layout=config.layout,
            rows=rows,
            trainable=sum(row.parameters for row in rows) + sum(extra_weights.values()),
            total=count_parameters(model),
            extra_weights=extra_weights,
            towers=_towers(model, couplings, dtypes, extra_weights),
            couplings=_counted(coupling.status for coupling in (couplings if is_custom else ())),
            weights=_counted(row.status for row in weights),
        )

    @property
    def share(self) -> float:
        """Trained parameters as a share of the base model's parameters, 0 to 1."""
        return self.trainable / self.total

    def __str__(self) -> str:
        rows = [("projection", "layers", "units per layer", "parameters", "dtype")]
        rows += [
            (row.projection, str(row.layers), row.units, f"{row.parameters:,}", str(row.dtype).removeprefix("torch."))
            for row in self.rows
        ]
        lines = [table(rows, right={1, 3})]
        if self.extra_weights:
            lines.append(
                f"trained in full: {', '.join(self.extra_weights)} ({sum(self.extra_weights.values()):,} parameters)"
            )
        done = "were trained, and are frozen now" if self.is_frozen else "are trained"
        lines.append(
            f"adapter {self.name!r}, layout {self.layout}: {self.trainable:,} of {self.total:,} parameters "
            f"{done} ({self.share:.2%})"
        )
        lines += self._about_couplings()
        lines += [self.unproved] if self.unproved else []
        lines += [self.untested] if self.untested else []
        if self.statistics:
            lines.append(
                f"training mode changes the running statistics of {len(self.statistics)} modules, the first of them "
                f"{self.statistics[0]}, which no adapter holds and nothing restores: put them into eval()"
            )
        if self.fresh_heads:
            lines.append(
                f"new, but frozen: {', '.join(self.fresh_heads)}; to train and save such modules, give "
                f"S2FTConfig modules_to_save={list(self.fresh_heads)}"
            )
        return "\n".join(lines)

    def _about_couplings(self) -> Iterator[str]:
        frozen = ", ".join(tower for tower, is_trained in self.towers.items() if not is_trained)
        if self.towers:
            trained = ", ".join(tower for tower, is_trained in self.towers.items() if is_trained)
            yield f"towers: {trained} trained" + (f"; {frozen} frozen (towers= trains them)" if frozen else "")
        what = "weights of the blocks" if self.weights else "couplings"
        counts = [f"{count} {status}" for status, count in (self.weights or self.couplings).items()]
        if counts:
            yield f"{what}: {', '.join(counts)}"


def _rows(model: nn.Module, selection: Selection, dtypes: dict[Projection, torch.dtype]) -> list[Row]:
    """Group what is trained: one row for each projection and number of units. dtypes: those of the slices."""
    groups = by_key(((_name_in_layer(one), one.key, one.count, selection[one.name].numel()), one) for one in dtypes)
    return [
        Row(shown, *_spread(group, units), units * sum(unit_parameters(model, one) for one in group), dtypes[group[0]])
        for (shown, *_, units), group in groups.items()
    ]


def _towers(
    model: nn.Module, couplings: list[Coupling], slices: Iterable[Projection], extra_weights: Iterable[str]
) -> dict[str, bool]:
    """Whether anything is trained in each tower that has couplings, or in which something is trained in full."""
    trained = {tower_of(model, path) for path in (*(one.path for one in slices), *extra_weights)}
    present = trained | {tower_of(model, coupling.main.path) for coupling in couplings}
    return {tower: tower in trained for tower in TOWERS if tower in present} if len(present) > 1 else {}


def _counted(statuses: Iterable[str]) -> dict[str, int]:
    counts = Counter(statuses)
    return {status: counts[status] for status in STATUSES if status in counts}


def units_of(projection: Projection, units: int) -> str:
    """Return the number of units in words, for example "46 of 1536 channels"."""
    return f"{units} of {projection.count} {unit_name(projection)}"


def _spread(group: list[Projection], units: int) -> tuple[int, str]:
    """Return the number of layers, and the units of each layer in words."""
    text = units_of(group[0], units)
    if group[0].expert is None:
        return len(group), text
    experts = Counter(one.path for one in group)
    return len(experts), f"{text}, {span(list(experts.values()))} experts"


def _name_in_layer(projection: Projection) -> str:
    """Return the part of a projection's name that all layers share: the part after the last number in its path."""
    names = projection.path.split(".")
    numbers = [i for i, name in enumerate(names[:-1]) if name.isdigit()]
    shown = projection.path if names[-1].isdigit() or not numbers else ".".join(names[numbers[-1] + 1 :])
    return shown if projection.size is None else f"{shown}.{projection.key}"


# ---- new heads, which attach leaves frozen unless `modules_to_save` names them ------------------------------------

LOADED = "_is_hf_initialized"  # transformers sets it on every parameter that it has loaded from a checkpoint


def fresh_heads(model: nn.Module, record: Record) -> list[str]:
    """Return the paths of frozen modules that are not in the checkpoint which from_pretrained has loaded.

    A language model's head does not count: most of its rows are old if the vocabulary was resized.

    Args:
        model: The model, attached or not.
        record: A record that has the model's couplings.
    """

    def is_new(module: nn.Module) -> bool:
        loaded = [getattr(parameter, LOADED, False) for parameter in module.parameters()]
        return bool(loaded) and not any(loaded)

    coupled = coupled_names(record.couplings)
    return [
        path
        for path, module in ({} if is_new(model) else outermost(model, is_new)).items()  # {}: nothing was loaded
        if module is not getattr(model, "lm_head", None)
        and not any(one.requires_grad or f"{path}.{name}" in coupled for name, one in module.named_parameters())
    ]


@on_unwrapped
def print_trainable_parameters(model: nn.Module) -> None:
    """Print one line with the number of trained parameters, as PEFT's models do.

    The numbers are those of the report of :func:`s2ft.attach`. A slice is part of a weight of the base, so it is not
    counted twice.

    Args:
        model: Model with a trainable adapter.

    Raises:
        ValueError: The model has no adapters.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.print_trainable_parameters(model)
        trainable params: 1,664 || all params: 86,336 || trainable%: 1.9274
    """
    report = Report.of(model)
    print(
        f"trainable params: {report.trainable:,} || all params: {report.total:,} || trainable%: "
        f"{100 * report.share:.4f}"
    )


# ---- status ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Status:
    """The adapters of a model; prints as a table with one line an adapter.

    Attributes:
        adapters: Names of all adapters, the trainable one first.
        active: Weights of the active adapters by name; empty if the model computes the base.
        trainable: Name of the adapter whose slices require a gradient, or None.
        rows: One row for each projection of each adapter.
        parameters: Trained parameters by adapter, with its extra weights.
    """

    adapters: list[str]
    active: dict[str, float]
    trainable: str | None
    rows: list[StatusRow]
    parameters: dict[str, int]

    def __str__(self) -> str:
        active = ", ".join(name if weight == 1 else f"{weight:g} × {name}" for name, weight in self.active.items())
        title = f"adapters: {len(self.adapters)}; active: {active or 'none'}; trainable: {self.trainable or 'none'}"
        if not self.adapters:
            return title
        lines = [("adapter", "projections", "units", "parameters")]
        lines += [self._line(name) for name in self.adapters]
        return f"{title}\n{table(lines, right={1, 3})}"

    def _line(self, name: str) -> tuple[str, str, str, str]:
        """One adapter: name, projections, units of each kind of projection, parameters."""
        rows = [row for row in self.rows if row.adapter == name]
        units = Counter(row.units for row in rows)
        shown = [f"{count} × {text}" for text, count in list(units.items())[:2]]
        more = [f"and {len(units) - 2} more"] if len(units) > 2 else []
        return name, str(len(rows)), ", ".join(shown + more), f"{self.parameters[name]:,}"


@on_unwrapped
def status(model: nn.Module) -> Status:
    """Return the adapters of a model, with one row for each projection of each adapter.

    Args:
        model: Any model. One without adapters has an empty status.

    Returns:
        The status. It prints as a table with one line an adapter; its `rows` have every projection.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> print(s2ft.status(model))
        adapters: 1; active: math; trainable: math
        adapter  projections  units                   parameters
        math               2  2 × 13 of 128 channels       1,664
    """
    record = find_record(model)
    if record is None:
        return Status([], {}, None, [], {})
    has_gradients = any(mounted.layer.s2.requires_grad for mounted in record.mounts.values())
    parameters = {name: adapter.parameters for name, adapter in record.loaded.items()}
    selections = {name: adapter.selection for name, adapter in record.loaded.items()}
    if record.trainable is not None:
        selections = {record.trainable: cast(Selection, record.selection), **selections}
        own = (*record.slices.values(), *extra_parameters(model, record).values())
        parameters[record.trainable] = sum(full_shape(one).numel() for one in own)  # also where ZeRO-3 holds a shard
    rows = [
        StatusRow(
            path,
            name,
            units_of(record.projections[path], units.numel()),
            units.numel() * record.projections[path].unit,
            record.active.get(name, 0.0),
            has_gradients and name == record.trainable,
        )
        for name, selection in selections.items()
        for path, units in selection.units.items()
    ]
    return Status(record.names, dict(record.active), record.trainable if has_gradients else None, rows, parameters)
