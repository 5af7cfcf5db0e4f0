"""Selection: which units are trained (S²FT paper, section 3.2 and its strategies S²FT-R, -W, -A, -S and -G).

See metrics.py for what scores units, and budget.py for how many units each projection gets, and which.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.config import PROTECTED, S2FTConfig
from s2ft.distributed import decide, is_distributed
from s2ft.files.tables import by_key
from s2ft.model.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.model.weights import can_run, have_numbers
from s2ft.selection.batches import Calibration
from s2ft.selection.budget import (
    ALLOCATIONS,
    best_first,
    check_enough,
    requested_layers,
    requested_projections,
    units_per_projection,
)
from s2ft.selection.groups import Groups
from s2ft.selection.metric import Request, Units, check_finite, shared_by_producers
from s2ft.selection.metrics import METRICS, product_scores
from s2ft.selection.selection import Selection, unit_tensors

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
        groups = Groups(couplings, config)
        try:
            return groups.units_of(select(groups.couplings, groups.config, model, calibration, protect))
        except ValueError as error:
            raise ValueError(f"in groups of {config.group} inputs: {error}") from error
    if reads_weights(config) and model is not None:  # only some ranks may have them
        return _select_where_weights_are(couplings, config, model, calibration, protect)
    return _select(couplings, config, model, calibration, protect)


def reads_weights(config: S2FTConfig) -> bool:
    """Whether a selection depends on the values of the weights."""
    return config.units is None and (METRICS[config.selection].ordered or config.protect_ratio is not None)


def _select_where_weights_are(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module, calibration: Any, protect: Any
) -> Selection:
    """Select on the ranks that have the weights. Ranks whose model is on the meta device get the result."""
    runs = METRICS[config.selection].calibrated or protect is not None
    is_able = can_run(model) if runs else have_numbers(model, couplings)
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
    return Selection({path: torch.tensor(numbers, dtype=torch.int64) for path, numbers in units.items()})


def _select(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module | None, calibration: Any, protect: Any
) -> Selection:
    metric = METRICS[config.selection]
    if calibration is None and metric.calibrated:
        raise ValueError(
            f"selection={config.selection!r} needs calibration data: pass calibration, an iterable of batches"
        )
    if calibration is not None and not metric.calibrated:
        raise ValueError(f"selection={config.selection!r} takes no calibration data: leave out calibration")
    requested, layers = requested_projections(couplings, config), requested_layers(couplings, config)
    request = Request([coupling for coupling in couplings if coupling.layer in layers], config, model)
    allowed = allowed_units(couplings, requested, config.exclude)
    if protect is not None:
        if model is None:
            raise ValueError("protect needs the model: it runs on the protect data")
        has_ratios = config.budget is None and config.match_lora_rank is None
        budget = units_per_projection(request.couplings, config) if has_ratios else None
        data = Calibration(protect, next(model.parameters()).device, "protect")
        allowed = allowed_without_protected(replace(request, calibration=data), allowed, budget)
    free = {path: int(units.sum()) for path, units in allowed.items()}
    budget = units_per_projection(couplings, config, model, free)
    if metric.calibrated:
        request = replace(request, calibration=Calibration(calibration, next(model.parameters()).device))
    scores = metric.score(request)
    check_finite(f"selection={config.selection!r}", scores)
    smallest = metric.ordered and config.order == "smallest"
    return Selection(
        ALLOCATIONS[config.allocation](request, shared_by_producers(request, scores), budget, allowed, smallest)
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
    allowed = {projection.name: torch.ones(projection.count, dtype=torch.bool) for projection in requested}
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
            raise ValueError(f"{option} names {path}, which is not a projection of this model")
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


def allowed_without_protected(request: Request, allowed: Units, budget: dict[str, int] | None) -> Units:
    """Return which units may still be chosen if those that the base needs most are protected.

    Producers with the same units protect the same ones, so that their selections stay nested.

    Args:
        request: What is selected, with the protect data as its calibration.
        allowed: Masks of the units that may be chosen otherwise, shape [count], by projection.
        budget: Number of units to choose by projection, if it is known. It is checked before the data are run.

    Returns:
        Masks as in `allowed`.

    Raises:
        ValueError: Too few units are left, or the data are unusable.
    """
    protected = {p.name: int(request.config.protect_ratio * p.count + 1e-9) for p in request.projections}
    if budget is not None:  # whichever units are protected, enough must be left
        uniform = request.config.allocation == "uniform"
        groups = by_key(
            (projection.name if uniform else projection.key, projection) for projection in request.projections
        )
        for projections in groups.values():
            left = sum(min(int(allowed[p.name].sum()), p.count - protected[p.name]) for p in projections)
            check_enough(projections, sum(budget[p.name] for p in projections), left, request.config)
    scores = shared_by_producers(request, product_scores(request))
    check_finite("protect", scores)
    kept = {}
    for projection in request.projections:
        mask = allowed[projection.name].clone()
        mask[best_first(scores[projection.name], smallest=False)[: protected[projection.name]]] = False
        kept[projection.name] = mask
    return kept
