"""Selection: which units are trained (S²FT paper, section 3.2 and its strategies S²FT-R, -W, -A, -S and -G).

See metrics.py for what scores units, and budget.py for how many units each projection gets, and which.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from s2ft.config import S2FTConfig
from s2ft.distributed import decide, is_distributed
from s2ft.model.coupling import Coupling
from s2ft.model.weights import can_run, have_numbers
from s2ft.selection.allowed import allowed_units, allowed_without_protected, named_units, with_protect_ratio
from s2ft.selection.batches import Calibration
from s2ft.selection.budget import ALLOCATIONS, requested_layers, requested_projections, units_per_projection
from s2ft.selection.groups import Groups
from s2ft.selection.metric import Request, check_finite, shared_by_producers
from s2ft.selection.metrics import METRICS
from s2ft.selection.selection import Selection

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
        return groups.units_of(select(groups.couplings, groups.config, model, calibration, protect))
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
