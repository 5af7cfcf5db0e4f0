"""Which units are trained: one file a metric, plus calibration, the budget, the allocation and the result."""

from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling
from s2ft.selection.activation import activation_scores
from s2ft.selection.allocation import ALLOCATIONS
from s2ft.selection.budget import requested_layers, requested_projections, units_per_projection
from s2ft.selection.calibration import Calibration
from s2ft.selection.disjoint import allowed_units, units_by_hand
from s2ft.selection.gradient import gradient_scores
from s2ft.selection.metric import Metric, Request, shared_by_producers
from s2ft.selection.product import product_scores
from s2ft.selection.random import random_scores
from s2ft.selection.selection import Selection
from s2ft.selection.weight import weight_scores

METRICS: dict[str, Metric] = {
    "random": Metric(random_scores, calibrated=False, ordered=False),
    "weight": Metric(weight_scores, calibrated=False),
    "activation": Metric(activation_scores, calibrated=True),
    "product": Metric(product_scores, calibrated=True),
    "gradient": Metric(gradient_scores, calibrated=True),
}

__all__ = ["METRICS", "Selection", "select"]


def select(
    couplings: list[Coupling], config: S2FTConfig, model: nn.Module | None = None, calibration=None
) -> Selection:
    """The units that `config` asks for, by projection, in original order.

    Depends on the couplings, the config and, for metrics, the model's weights and the calibration data: the
    same on every rank and for every layout. Units of the same score are taken by number. The model is
    afterwards as it was, whatever happens.

    Args:
        model: whose couplings they are; needed but for random selection by ratios.
        calibration: batches, see :class:`Calibration`; for the metrics that need data and only for them.
    Raises: ValueError when nothing is asked for, a ratio or budget comes to no unit, a projection, layer or unit
        that is named does not exist, exclude leaves too few, or calibration is missing, not needed or unusable.
    """
    if config.units is not None:
        if calibration is not None:
            raise ValueError("units are given by hand: there is nothing to calibrate")
        return units_by_hand(couplings, config.units)
    metric = METRICS[config.selection]
    _check_calibration(config, metric, calibration)
    allowed = allowed_units(couplings, requested_projections(couplings, config), config.exclude)
    free = {path: int(units.sum()) for path, units in allowed.items()}
    budget = units_per_projection(couplings, config, model, free)
    if metric.calibrated:
        calibration = Calibration(calibration, next(model.parameters()).device)
    layers = requested_layers(couplings, config)
    request = Request([coupling for coupling in couplings if coupling.layer in layers], config, model, calibration)
    scores = metric.score(request)
    _check_finite(config, scores)
    smallest = metric.ordered and config.order == "smallest"
    return Selection(
        ALLOCATIONS[config.allocation](request, shared_by_producers(request, scores), budget, allowed, smallest)
    )


def _check_calibration(config: S2FTConfig, metric: Metric, calibration) -> None:
    if calibration is None and metric.calibrated:
        raise ValueError(
            f"selection={config.selection!r} needs calibration data: pass calibration, an iterable of batches"
        )
    if calibration is not None and not metric.calibrated:
        raise ValueError(f"selection={config.selection!r} takes no calibration data")


def _check_finite(config: S2FTConfig, scores: dict[str, Tensor]) -> None:
    for path, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"selection={config.selection!r}: the statistics of {path} are NaN or infinite")
