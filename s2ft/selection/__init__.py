"""Selection: which units are trained (S²FT paper, section 3.2 and its strategies S²FT-R, -W, -A, -S and -G).

A group is chosen as one unit of a coarser projection, so that every metric scores it and every budget counts it.

See metrics.py for what scores units.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.config import PROJECTIONS, PROTECTED, S2FTConfig, refuse
from s2ft.distributed import decide, is_distributed
from s2ft.files.plain_text import replace_file, table
from s2ft.files.reading import MAX_CONFIG, own_folder, parse_json, read_bytes, read_consistent
from s2ft.model.coupling import ONE_SIDED, Coupling, Projection, by_key, digest_of, projections_of, unit_name
from s2ft.model.weights import can_run, have_values, weight_at
from s2ft.selection.batches import Calibration
from s2ft.selection.metrics import (
    METRICS,
    Allocation,
    Request,
    Units,
    check_finite,
    product_scores,
    shared_by_producers,
)

# ---- the result -----------------------------------------------------------------------------------------------------

SCHEMA = 1


@dataclass(frozen=True)
class Selection:
    """Which units are trained, by projection. :func:`s2ft.select` makes it. It prints as a table.

    ``selection[name]`` returns the units of a projection, and ``name in selection`` tests for one.

    Attributes:
        units: Sorted unit numbers by projection name, shape [n], int64, in the base model's order.

    Example:
        >>> selection = s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02))
        >>> print(selection)
        projection  layers  units per layer  units
        down_proj        2                3      6
        >>> "model.layers.0.mlp.down_proj" in selection
        True
        >>> selection["model.layers.0.mlp.down_proj"].shape
        torch.Size([3])
    """

    units: dict[str, Tensor]

    def __getitem__(self, path: str) -> Tensor:
        return self.units[path]

    def __contains__(self, path: str) -> bool:
        return path in self.units

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, Selection)
            and self.units.keys() == other.units.keys()
            and all(torch.equal(units, other.units[path]) for path, units in self.units.items())
        )

    def to_dict(self) -> dict[str, list[int]]:
        """Return the unit numbers as lists, for JSON and for ``S2FTConfig(units=...)``.

        Returns:
            Lists of unit numbers by projection name, sorted by name.

        Example:
            >>> s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02, seed=1)).to_dict()
            {'model.layers.0.mlp.down_proj': [...], 'model.layers.1.mlp.down_proj': [...]}
        """
        return {path: units.tolist() for path, units in sorted(self.units.items())}

    @cached_property
    def digest(self) -> str:
        """The sha256 of the selection. It is the same on all ranks and is saved in the adapter.

        Returns:
            64 hexadecimal digits.

        Example:
            >>> len(s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02)).digest)
            64
        """
        return digest_of(self.to_dict())

    def __str__(self) -> str:
        groups = by_key((_label(path), units.numel()) for path, units in self.units.items())
        head = ("projection", "layers", "units per layer", "units")
        rows = [(name, str(len(sizes)), span(sizes), f"{sum(sizes):,}") for name, sizes in groups.items()]
        return table([head, *rows], right={1, 2, 3})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the selection to a JSON file. An existing file is replaced in one step.

        Args:
            path: File to write.

        Example:
            >>> selection = s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02))
            >>> selection.save("units.json")
            >>> s2ft.select(model, s2ft.S2FTConfig(units="units.json")) == selection
            True
        """
        content = {"schema": SCHEMA, "units": self.to_dict(), "digest": self.digest}
        replace_file(Path(path).expanduser(), json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Selection":
        """Read a selection from a file that :meth:`save` wrote, or from an adapter folder.

        Args:
            path: File, adapter folder, or output folder of a run.

        Returns:
            The selection.

        Raises:
            FileNotFoundError: The path does not exist.
            ValueError: The file does not contain a selection, or is damaged.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.02))
            >>> s2ft.save_adapter(model, "adapter")
            >>> s2ft.Selection.load("adapter")["model.layers.1.mlp.down_proj"].numel()
            3
        """
        path = Path(path).expanduser()
        if path.is_dir():
            return read_consistent(own_folder(path), _of_adapter)
        content = _read_object(path, "a selection")
        schema = content.get("schema")
        refuse(
            (
                content.keys() != {"schema", "units", "digest"},
                f"{path} is not a selection: it must have schema, units and digest, not {sorted(content)}",
            ),
            (
                schema != SCHEMA or isinstance(schema, bool),
                f"{path} has schema {schema!r}; this s2ft reads schema {SCHEMA}",
            ),
        )
        return _checked(path, content["units"], content["digest"])


def _label(name: str) -> str:
    """Return the part of a projection's name that all layers share: the last word, without the expert's number.

    If several projections share a weight, it is the last two words.
    """
    *_, before, last = ["", *re.sub(r"\[\d+\]", "", name).split(".")]
    return f"{before}.{last}" if last in PROJECTIONS and before else last


def span(sizes: list[int]) -> str:
    """Format a range of numbers, such as "3" or "3 to 5"."""
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def with_units(config: S2FTConfig) -> S2FTConfig:
    """Check that a config is one, and return it with units themselves where it has the path of a file of them.

    Raises:
        TypeError: It is not an S2FTConfig.
    """
    if not isinstance(config, S2FTConfig) or hasattr(config, "peft_type"):  # PEFT's has fields that no folder takes
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    read: Any = {
        one: Selection.load(getattr(config, one)).to_dict()
        for one in ("units", "exclude")
        if isinstance(getattr(config, one), str)
    }
    return replace(config, **read)  # a copy, so that the caller may change its own


def unit_tensors(units: Any, what: str) -> dict[str, Tensor]:
    """Read units from the value of an option.

    Args:
        units: Lists of unit numbers by projection name, or the path of a selection file or an adapter folder.
        what: Name of the option, for messages.

    Returns:
        Sorted unit numbers by projection name, shape [n], int64.

    Raises:
        ValueError: The units are not lists of different numbers from 0, or the file does not contain a selection.
    """
    return Selection.load(units).units if isinstance(units, str) else _tensors(units, what)


def _tensors(units: Any, what: str) -> dict[str, Tensor]:
    if not isinstance(units, dict) or not units or not all(isinstance(path, str) for path in units):
        raise ValueError(f"{what} must give lists of unit numbers by module path, and at least one")
    tensors = {}
    for path, numbers in units.items():
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        if (
            not isinstance(numbers, (list, tuple))
            or not numbers
            or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**63 for n in numbers)
        ):
            raise ValueError(f"{what}: {path} must have a list of unit numbers from 0, and at least one")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{what}: {path} names a unit twice")
        tensors[path] = torch.tensor(sorted(numbers), dtype=torch.int64, device="cpu")
    return tensors


def _of_adapter(path: Path) -> Selection:
    content = _read_object(path, "an adapter config")
    projections = content.get("projections")
    if not isinstance(projections, dict) or not all(isinstance(entry, dict) for entry in projections.values()):
        raise ValueError(f"{path} is not an S²FT adapter config: it has no projections")
    units = {key: entry.get("units") for key, entry in projections.items()}
    return _checked(path, units, content.get("selection_digest"))


def _read_object(path: Path, what: str) -> dict[str, Any]:
    content = parse_json(read_bytes(path, MAX_CONFIG), f"{path} is not {what}: it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it contains a {type(content).__name__}, not an object")
    return content


def _checked(path: Path, units: Any, digest: Any) -> Selection:
    """Make the selection of a file, and check it against the digest in the file."""
    selection = Selection(_tensors(units, str(path)))
    if selection.digest != digest:
        raise ValueError(f"{path}: the units listed are not those that were saved, or not in order")
    return selection


# ---- how many units -------------------------------------------------------------------------------------------------


def units_per_projection(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module | None = None, free: dict[str, int] | None = None
) -> dict[str, int]:
    """Return the number of units to train, by projection name (S²FT paper, section 3.2).

    A ratio is the share of a projection's units, the same in every layer. If units are drawn from all layers together,
    it is the share of the units of all layers, rounded down, as in the paper's code. With a budget of parameters, all
    ratios are scaled to the largest whole numbers of units that fit. Layers then differ by one unit if the budget is
    not a multiple. With `align`, each number is rounded down at the end. With allocation "global", only the sum over
    the layers of a projection counts.

    Args:
        couplings: Couplings of the model.
        config: What to select.
        model: The model. Only a budget needs it.
        free: Number of units that may be chosen, by projection name. Default: all.

    Raises:
        ValueError: Nothing is requested; a ratio or the budget gives no unit; the budget is larger than all units that
            may be chosen; `align` is more than the units of a projection; or the config names a projection or layer
            that the model does not have.
    """
    requested = [p for p in projections_of(requested_couplings(couplings, config)) if p.key in config.ratios]
    if config.budget is None and config.match_lora_rank is None:
        if config.selection == "random" and config.allocation == "global":
            return _units_over_layers(requested, config.ratios)
        return _aligned({p.name: _units(p, config.ratios[p.key]) for p in requested}, requested, config.align)
    free = {p.name: p.count if free is None else free.get(p.name, p.count) for p in requested}
    costs = {p.name: unit_parameters(cast(nn.Module, model), p) for p in requested}
    shares = {p.name: config.ratios[p.key] * p.count for p in requested}
    total, what = _budget(config, cast(nn.Module, model), requested)
    most = sum(free[path] * costs[path] for path in free)
    if total > most:
        taken = "" if config.protect_ratio is None else f" with protect_ratio={config.protect_ratio:g}"
        raise ValueError(
            f"{what} is more than the {most:,} parameters that the requested projections have to choose "
            f"from{taken}: lower it, or request more projections"
        )
    units = _aligned(share_out(total, shares, free, costs), requested, config.align)
    is_uniform = config.allocation == "uniform"  # else one layer of each kind is enough
    for alike in by_key((p.name if is_uniform else p.key, p) for p in requested).values():
        if not any(units[other.name] for other in alike):
            raise ValueError(
                f"{what} is too small: it leaves {alike[0].name} no unit, and a unit of it has "
                f"{costs[alike[0].name]:,} parameters. Raise it or {alike[0].key}_ratio, or train fewer layers or "
                "projections"
            )
    return units


def _aligned(units: dict[str, int], requested: list[Projection], align: int | None) -> dict[str, int]:
    """Round numbers of units down to multiples of `align`.

    Fewer heads than that stay, if the elements of all of them together are a multiple.

    Raises:
        ValueError: A projection has fewer units, and their elements are no multiple.
    """
    if align is None:
        return units
    rounded = {}
    for projection in requested:
        number = units[projection.name]
        is_met = number >= align or number * projection.unit % align == 0
        if not is_met:
            raise ValueError(
                f"align={align} can't be met: {projection.name} would train {number} units, which is fewer. Raise "
                f"{projection.key}_ratio or the budget, or lower align to {number} or less"
            )
        rounded[projection.name] = number - number % align if number >= align else number
    return rounded


def requested_couplings(couplings: list[Coupling], config: S2FTConfig) -> list[Coupling]:
    """Return the couplings of the layers to train.

    Raises:
        ValueError: The config's ratios request nothing, or a projection that these layers do not have, or the config
            names a layer that the model does not have.
    """
    if not config.ratios:
        raise ValueError(
            "nothing is selected: set at least one of q_ratio, k_ratio, v_ratio, o_ratio, "
            "u_ratio, g_ratio, d_ratio, l_ratio, i_ratio above 0"
        )
    known = {coupling.layer for coupling in couplings}
    layers = known if config.layers is None else set(config.layers)
    if layers - known:
        raise ValueError(
            f"layers names {sorted(layers - known)}, but the model has layers {min(known)} to {max(known)}"
        )
    requested = [coupling for coupling in couplings if coupling.layer in layers]
    present = sorted({projection.key for projection in projections_of(requested)}, key=PROJECTIONS.index)
    for key in config.ratios:
        if key not in present:
            raise ValueError(
                f"{key}_ratio requests a projection that the layers to train do not have: there are "
                f"{', '.join(present) or 'none'}, so set "
                f"{' or '.join(f'{one}_ratio' for one in present) or 'other layers'}"
            )
    return requested


def _units(projection: Projection, ratio: float) -> int:
    units = int(ratio * projection.count + 0.5)
    if projection.key in ONE_SIDED:  # layers of very different sizes share this ratio
        return max(1, units)
    if units == 0:
        raise ValueError(
            f"{projection.key}_ratio={ratio} selects none of the {projection.count} "
            f"{unit_name(projection)} of {projection.name}; the smallest ratio that selects one is "
            f"{math.ceil(5000 / projection.count) / 10000:g}"
        )
    return units


def _units_over_layers(requested: list[Projection], ratios: dict[str, float]) -> dict[str, int]:
    """Distribute the share of all units of each kind of projection over the layers.

    Only the sum counts where a unit has as many parameters in every layer.
    """
    units = {}
    for key, ratio in ratios.items():
        alike = [p for p in requested if p.key == key]
        count = sum(p.count for p in alike)
        total = math.floor(round(ratio * count, 9))  # a product such as 0.07 * 100 is 7.000000000000001
        if total == 0:
            raise ValueError(
                f"{key}_ratio={ratio} selects none of the {count} {unit_name(alike[0])} of all layers; the smallest "
                f"ratio that selects one is {math.ceil(1e6 / count) / 1e6:g}"
            )
        # the sums up to each layer are rounded, so that they end at the total
        sums = [total * before // count for before in accumulate((p.count for p in alike), initial=0)]
        units.update({p.name: after - before for p, before, after in zip(alike, sums, sums[1:])})
    return units


def unit_parameters(model: nn.Module, projection: Projection) -> int:
    """Return the number of trained parameters of one unit."""
    shape = weight_at(model, projection).shape
    return shape.numel() // shape[projection.dim] * projection.unit


def _budget(config: S2FTConfig, model: nn.Module, requested: list[Projection]) -> tuple:
    """Return the number of parameters, and the option for messages."""
    if config.budget is not None:
        return config.budget, f"budget={config.budget:,}"
    rank = cast(int, config.match_lora_rank)
    shapes = {p.weight_key: weight_at(model, p).shape for p in requested}  # LoRA has one pair of factors per weight
    total = sum(rank * (shape[0] + shape[1:].numel()) for shape in shapes.values())
    return total, f"match_lora_rank={rank}, {total:,} parameters,"


def share_out(total: int, shares: dict[str, float], free: dict[str, int], costs: dict[str, int]) -> dict[str, int]:
    """Distribute `total` parameters over the projections in the proportion of `shares`.

    The shares are scaled and rounded down to whole units. The parameters that are left over go to the projections that
    lost most by the rounding, until no further unit fits.

    Args:
        total: Number of parameters to distribute.
        shares: Number of units by projection, to be scaled.
        free: Largest number of units by projection.
        costs: Parameters of one unit by projection.

    Returns:
        Number of units by projection.
    """
    scale = _scale(total, shares, free, costs)
    exact = {path: min(free[path], scale * shares[path]) for path in shares}
    units = {path: int(amount) for path, amount in exact.items()}
    left = total - sum(units[path] * costs[path] for path in units)
    order = sorted(units, key=lambda path: round(units[path] - exact[path], 9))  # a stable sort
    fits = True
    while fits:
        fits = False
        for path in order:
            if units[path] < free[path] and costs[path] <= left:
                units[path], left, fits = units[path] + 1, left - costs[path], True
    return units


def _scale(total: int, shares: dict[str, float], free: dict[str, int], costs: dict[str, int]) -> float:
    """Find the factor of `shares` at which fractional units cost `total`, by bisection from below."""
    low, high = 0.0, max(free[path] / shares[path] for path in shares)
    for _ in range(100):
        middle = (low + high) / 2
        cost = sum(costs[path] * min(free[path], middle * shares[path]) for path in shares)
        low, high = (middle, high) if cost <= total else (low, middle)
    return low


# ---- which units: an allocation is a row here and in s2ft/config.py ----------------------------------------


def best_first(scores: Tensor, smallest: bool) -> Tensor:
    """Return the units in the order of their scores, shape [n]. Units with the same score keep their order."""
    return scores.argsort(descending=not smallest, stable=True)


def check_enough(projections: list[Projection], requested: int, available: int) -> None:
    """Raise ValueError if fewer units are available than requested. The message names the options that take units."""
    if requested > available:
        where = projections[0].path if len(projections) == 1 else f"the layers' {projections[0].key} projections"
        raise ValueError(
            f"exclude or protect_ratio leaves {available} {unit_name(projections[0])} of {where} to choose from; "
            f"{requested} are requested"
        )


def uniform(request: Request, scores: Units, counts: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Return the best units of every projection, as many as `counts` gives it."""
    chosen = {}
    for projection in request.projections:
        path, units = projection.name, counts[projection.name]
        if units:
            ranking = best_first(scores[path], smallest)
            ranking = ranking[allowed[path][ranking]]
            check_enough([projection], units, ranking.numel())
            chosen[path] = ranking[:units].sort().values
    return chosen


def over_layers(request: Request, scores: Units, counts: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Return the best units over all layers for each kind of projection, with as many parameters as `counts` gives it.

    Scores are compared without normalising them by layer, so a layer may get no unit or all. Units with the same score
    are chosen in the order of their layers, then of their numbers.
    """
    chosen: Units = {}
    for projections in by_key((projection.key, projection) for projection in request.projections).values():
        check_enough(
            projections, sum(counts[p.name] for p in projections), sum(int(allowed[p.name].sum()) for p in projections)
        )
        costs = [unit_parameters(request.model, p) for p in projections]
        parameters = sum(cost * counts[p.name] for p, cost in zip(projections, costs))
        sizes = torch.tensor([p.count for p in projections], device="cpu")
        cost = torch.tensor(costs, device="cpu").repeat_interleave(sizes)  # of the units, a projection after the other
        ranking = best_first(torch.cat([scores[p.name] for p in projections]), smallest)
        ranking = ranking[torch.cat([allowed[p.name] for p in projections])[ranking]]
        taken = torch.zeros(cost.numel(), dtype=torch.bool, device="cpu")
        taken[ranking[cost[ranking].cumsum(0) <= parameters]] = True
        for projection, mask in zip(projections, taken.split(sizes.tolist())):
            if bool(mask.any()):
                chosen[projection.name] = mask.nonzero().squeeze(1)
    return chosen


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "global": over_layers}


# ---- groups of neighbouring inputs ----------------------------------------------------------------------------------


def _select_groups(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module | None, calibration: Any, protect: Any
) -> Selection:
    """Choose groups of `config.group` inputs of every consumer that the config requests. A group counts as a unit.

    Raises:
        ValueError: The inputs of a projection can't be split into groups of whole units, or units into groups.
    """
    grouped = [
        replace(coupling, consumer=_grouped(coupling.consumer, cast(int, config.group)))
        if coupling.consumer is not None and coupling.consumer.key in config.ratios
        else coupling
        for coupling in couplings
    ]
    both = zip(projections_of(couplings), projections_of(grouped))
    sizes = {projection.name: group.unit // projection.unit for projection, group in both}  # units of a group
    exclude: Any = config.exclude
    if exclude is not None:
        named = unit_tensors(exclude, "exclude")
        exclude = {path: (units // sizes.get(path, 1)).unique().tolist() for path, units in named.items()}
    try:
        chosen = select(grouped, replace(config, group=None, exclude=exclude), model, calibration, protect).units
    except ValueError as error:
        raise ValueError(f"in groups of {config.group} inputs: {error}") from error
    return Selection(
        {
            path: (groups[:, None] * sizes[path] + torch.arange(sizes[path], device="cpu")).flatten()
            for path, groups in chosen.items()
        }
    )


def _grouped(projection: Projection, group: int) -> Projection:
    """The projection with groups of inputs as its units."""
    if projection.unit % group == 0:  # a head of whole groups
        return projection
    inputs = projection.count * projection.unit
    if group % projection.unit or inputs % group:
        raise ValueError(
            f"group={group}: {projection.name} has {projection.count} {unit_name(projection)}"
            + (f" of {projection.unit} inputs" if projection.unit > 1 else "")
            + f", which are no whole groups of {group} inputs: leave out {projection.key}_ratio, or group"
        )
    return replace(projection, count=inputs // group, unit=group)


# ---- choosing -------------------------------------------------------------------------------------------------------


__all__ = ["ALLOCATIONS", "METRICS", "Selection", "select"]


def select(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module | None = None, calibration=None, protect=None
) -> Selection:
    """Choose the units that `config` requests.

    The result depends on the couplings, the config and, for metrics, on the weights, the calibration data and the
    protect data. It is the same on every rank and for every layout. Units with the same score are chosen in the order
    of their numbers. The model is restored afterwards, also after an error.

    Args:
        couplings: Couplings of the model.
        config: What to select.
        model: The model of the couplings. Random selection by ratios without `protect` does not need it.
        calibration: Batches of data, see :class:`Calibration`. Required by metrics that use data, and by no others.
        protect: Batches of data for which the base needs its units. The share `protect_ratio` of them is never chosen.

    Returns:
        The selected units, in the base model's order. On a rank whose model is on the meta device they are those of a
        rank that has the weights.

    Raises:
        ValueError: Nothing is requested; a ratio or budget gives no unit; a projection, layer or unit in the config
            does not exist; `exclude` or `protect_ratio` leaves too few units; or data are missing, not needed or
            unusable.
    """
    config = with_protect_ratio(config, protect is not None)
    if config.units is not None:
        if calibration is not None:
            raise ValueError("the config's units are given, so there is nothing to calibrate: leave out calibration")
        return Selection(named_units(couplings, config.units, "units"))
    if config.group is not None:
        return _select_groups(couplings, config, model, calibration, protect)
    if needs_weights(config) and model is not None:  # only some ranks may have them
        return _select_where_weights_are(couplings, config, model, calibration, protect)
    return _select(couplings, config, model, calibration, protect)


def needs_weights(config: S2FTConfig) -> bool:
    """Whether a selection depends on the values of the weights."""
    return config.units is None and (METRICS[config.selection].ordered or config.protect_ratio is not None)


def _select_where_weights_are(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module, calibration: Any, protect: Any
) -> Selection:
    """Select on the ranks that have the weights. Ranks whose model is on the meta device get the result."""
    runs = METRICS[config.selection].calibrated or protect is not None
    is_able = can_run(model) if runs else have_values(model, couplings)
    units = decide(
        f"selection={config.selection!r}",
        is_able,
        lambda: {k: v.tolist() for k, v in _select(couplings, config, model, calibration, protect).units.items()},
    ).value
    if units is None:
        raise ValueError(
            f"selection={config.selection!r}{' with protect data' * (protect is not None)} reads the weights, and they "
            f"are on the meta device{' on every rank' if is_distributed() else ''}: load them first, on one rank at "
            "least, or use selection='random' or units of a file"
        )
    return Selection({path: torch.tensor(numbers, dtype=torch.int64, device="cpu") for path, numbers in units.items()})


def _select(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module | None, calibration: Any, protect: Any
) -> Selection:
    metric = METRICS[config.selection]
    refuse(
        (
            calibration is None and metric.calibrated,
            f"selection={config.selection!r} needs calibration data: pass calibration, an iterable of batches",
        ),
        (
            calibration is not None and not metric.calibrated,
            f"selection={config.selection!r} takes no calibration data: leave out calibration",
        ),
    )
    request = Request(requested_couplings(couplings, config), config, cast(nn.Module, model))
    allowed = allowed_units(couplings, list(request.projections), config.exclude)
    if protect is not None:
        has_ratios = config.budget is None and config.match_lora_rank is None
        counts = units_per_projection(request.couplings, config) if has_ratios else None
        data = Calibration(protect, next(request.model.parameters()).device, "protect")
        allowed = allowed_without_protected(replace(request, calibration=data), allowed, counts)
    free = {path: int(units.sum()) for path, units in allowed.items()}
    counts = units_per_projection(couplings, config, model, free)
    if metric.calibrated:
        request = replace(request, calibration=Calibration(calibration, next(request.model.parameters()).device))
    scores = metric.score(request)
    check_finite(f"selection={config.selection!r}", scores)
    smallest = metric.ordered and config.order == "smallest"
    return Selection(
        ALLOCATIONS[config.allocation](request, shared_by_producers(request, scores), counts, allowed, smallest)
    )


# ---- which units may be chosen -----------------------------------------------------------------------
#
# Those that the config names, and not those that it excludes or that the base needs.


def allowed_units(
    couplings: list[Coupling], requested: list[Projection], exclude: dict[str, list[int]] | str | None
) -> dict[str, Tensor]:
    """Return which units may be chosen, as a mask of shape [count] by name of the requested projections.

    If a unit is excluded from one producer of a coupling, it is excluded from all producers with the same units, so
    that their selections stay nested.

    Raises:
        ValueError: A projection or a unit in `exclude` does not exist in the model.
    """
    excluded = {} if exclude is None else named_units(couplings, exclude, "exclude")
    allowed = {
        projection.name: torch.ones(projection.count, dtype=torch.bool, device="cpu") for projection in requested
    }
    for coupling in couplings:
        for projection in coupling.projections:
            alike = (
                [p for p in coupling.producers if p.count == projection.count] if projection.dim == 0 else [projection]
            )
            for other in alike:
                if projection.name in allowed and other.name in allowed and other.name in excluded:
                    allowed[projection.name][excluded[other.name]] = False
    return allowed


def named_units(couplings: list[Coupling], units: dict[str, list[int]] | str, option: str) -> Units:
    """Return the units that an option of the config names, by projection.

    Raises:
        ValueError: A projection or a unit does not exist in the model.
    """
    found = unit_tensors(units, option)
    known = {projection.name: projection for projection in projections_of(couplings)}
    for path, numbers in found.items():
        if path not in known:
            raise ValueError(
                f"{option} names {path}, which is not a projection of this model, or of the towers to train"
            )
        if int(numbers.max()) >= known[path].count:
            raise ValueError(
                f"{option}: {path} has {known[path].count} {unit_name(known[path])}, from 0; there is no "
                f"{int(numbers.max())}"
            )
    return found


# ---- units that the base needs on other data ------------------------------------------------------------------
#
# What a unit adds to the base's activations on other data is its weight norm times its activation norm there: the score
# of the metric `product`, and for a consumer's columns that of Wanda. SSU (arXiv 2512.04844) freezes the half of the
# columns with the largest scores on source data, and loses a seventh of what full fine-tuning loses there.


def with_protect_ratio(config: S2FTConfig, has_data: bool) -> S2FTConfig:
    """Return the config with the default share if protect data are given and it sets none.

    Args:
        config: What is selected.
        has_data: Whether protect data are given.

    Raises:
        ValueError: The config sets a share, and there are no data; or it names its units, so that there is no choice.
    """
    if not has_data:
        if config.protect_ratio is not None:
            raise ValueError(
                f"protect_ratio={config.protect_ratio:g} needs protect data: give protect, the text that the "
                "base must not forget"
            )
        return config
    if config.units is not None:
        raise ValueError("the config's units are given, so there is nothing to protect them from: leave out protect")
    return config if config.protect_ratio is not None else replace(config, protect_ratio=PROTECTED)


def allowed_without_protected(request: Request, allowed: Units, counts: dict[str, int] | None) -> Units:
    """Return which units may still be chosen if those that the base needs most are protected.

    Producers with the same units protect the same ones, so that their selections stay nested.

    Args:
        request: What is selected, with the protect data as its calibration.
        allowed: Masks of the units that may be chosen otherwise, shape [count], by projection.
        counts: Number of units to choose by projection, if it is known. It is checked before the data are run.

    Returns:
        Masks as in `allowed`.

    Raises:
        ValueError: Too few units are left, or the data are unusable.
    """
    protected = {p.name: int(cast(float, request.config.protect_ratio) * p.count + 1e-9) for p in request.projections}
    if counts is not None:  # whichever units are protected, enough must be left
        uniform = request.config.allocation == "uniform"
        groups = by_key(
            (projection.name if uniform else projection.key, projection) for projection in request.projections
        )
        for projections in groups.values():
            left = sum(min(int(allowed[p.name].sum()), p.count - protected[p.name]) for p in projections)
            check_enough(projections, sum(counts[p.name] for p in projections), left)
    scores = shared_by_producers(request, product_scores(request))
    check_finite("protect", scores)
    kept = {}
    for projection in request.projections:
        mask = allowed[projection.name].clone()
        mask[best_first(scores[projection.name], smallest=False)[: protected[projection.name]]] = False
        kept[projection.name] = mask
    return kept
