"""Candidates for the selection of units. Those that win move into s2ft/selection, the others are reported and removed.

Each candidate is one file named after it, which names its source and defines METRIC in the form of
s2ft/selection/metric.py, and one row of CANDIDATES.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from torch import nn

import s2ft
from bench.evidence.selections.request import ProtectedRequest, on_protected_data
from s2ft.attached.record import check_unattached
from s2ft.model.registry import find_couplings
from s2ft.model.towers import couplings_in_towers
from s2ft.selection import ALLOCATIONS, METRICS, Selection
from s2ft.selection.batches import Calibration
from s2ft.selection.budget import requested_layers, requested_projections, units_per_projection
from s2ft.selection.metric import Metric, Units, check_finite, shared_by_producers
from s2ft.selection.named_units import allowed_units
from s2ft.selection.protection import allowed_without_protected

__all__ = ["CANDIDATES", "Candidate", "choose"]


@dataclass(frozen=True)
class Candidate:
    """How a candidate chooses.

    Attributes:
        order: The end of the ranking that is meant, "largest" or "smallest".
        protected: Whether it reads protected data.
    """

    order: str = "largest"
    protected: bool = False

    def takes_smallest(self, config: s2ft.S2FTConfig) -> bool:
        """Return True if the smallest scores are taken: at order "largest" the end that is meant, else the other."""
        return (self.order == "smallest") != (config.order == "smallest")


CANDIDATES: dict[str, Candidate] = {
    "principal": Candidate(),
    "off_principal": Candidate(),
    "saliency": Candidate(),
    "gradient_per_weight": Candidate(),
    "shielded": Candidate("smallest", protected=True),
    "shielded_gradient": Candidate(protected=True),
    "fisher_ratio": Candidate(protected=True),
}


def choose(
    model: nn.Module,
    name: str,
    config: s2ft.S2FTConfig,
    calibration: Iterable[Any] | None = None,
    protect: Iterable[Any] | None = None,
) -> Selection:
    """Choose the units that a config requests by a candidate or by a metric of s2ft. The model does not change.

    Train them with `S2FTConfig(units=choose(...))`. The result is deterministic.

    Args:
        model: Model without adapters.
        name: A name of CANDIDATES, or of the metrics of s2ft.
        config: Ratios, budget, allocation, layers, exclude and order. Its `selection` is not used. Order "largest"
            takes the end of the ranking that a candidate is meant to take, "smallest" takes the other one.
        calibration: Batches of the task, see :func:`s2ft.select`. Not read by those that need none.
        protect: Batches of data that the base must not lose, in the same form. Some candidates score by them. With
            `config.protect_ratio`, the units that the base needs most there are never chosen, by any name.

    Returns:
        The chosen units.

    Raises:
        ValueError: There is no such name, or data that it needs are missing, empty or do not fit the model.

    Example:
        >>> config = s2ft.S2FTConfig(d_ratio=0.03)
        >>> units = choose(model, "shielded", config, protect=[{"input_ids": ids}])
        >>> s2ft.attach(model, s2ft.S2FTConfig(units=units))
    """
    protect = None if protect is None else list(protect)  # it may be read twice
    if name in METRICS:
        shield = protect if config.protect_ratio is not None else None
        needed = calibration if METRICS[name].calibrated else None
        return s2ft.select(model, replace(config, selection=name), needed, protect=shield)
    if name not in CANDIDATES:
        raise ValueError(f"name must be one of {', '.join([*METRICS, *CANDIDATES])}, got {name!r}")
    candidate, metric = CANDIDATES[name], import_module(f"{__name__}.{name}").METRIC
    check_unattached(model)
    request = _request(model, name, candidate, metric, config, calibration, protect)
    allowed = _allowed(request)
    free = {path: int(units.sum()) for path, units in allowed.items()}
    budget = units_per_projection(request.couplings, config, model, free)
    scores = metric.score(request)
    check_finite(name, scores)
    smallest = candidate.takes_smallest(config)
    return Selection(
        ALLOCATIONS[config.allocation](request, shared_by_producers(request, scores), budget, allowed, smallest)
    )


def _allowed(request: ProtectedRequest) -> Units:
    """Return the units that `exclude` and `protect_ratio` leave, as s2ft.select does."""
    config = request.config
    allowed = allowed_units(request.couplings, requested_projections(request.couplings, config), config.exclude)
    if config.protect_ratio is None:
        return allowed
    has_ratios = config.budget is None and config.match_lora_rank is None
    budget = units_per_projection(request.couplings, config) if has_ratios else None
    return allowed_without_protected(on_protected_data(request), allowed, budget)


def _request(
    model: nn.Module,
    name: str,
    candidate: Candidate,
    metric: Metric,
    config: s2ft.S2FTConfig,
    calibration: Iterable[Any] | None,
    protect: Iterable[Any] | None,
) -> ProtectedRequest:
    for data, needed, what in (
        (calibration, metric.calibrated, "calibration"),
        (protect, candidate.protected or config.protect_ratio is not None, "protect"),
    ):
        if needed and data is None:
            raise ValueError(f"{name} needs {what} data: pass {what}, an iterable of batches")
    device = next(model.parameters()).device
    couplings = couplings_in_towers(model, find_couplings(model, config=config).couplings, config)
    layers = requested_layers(couplings, config)
    return ProtectedRequest(
        [coupling for coupling in couplings if coupling.layer in layers],
        config,
        model,
        Calibration(calibration, device) if metric.calibrated else None,
        None if protect is None else Calibration(protect, device, "protect"),
    )
