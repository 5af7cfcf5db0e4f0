"""Candidates for the selection of units. Those that win move into s2ft/selection; the others stay here with their rows.

A candidate is a function from a request to scores by projection, shape [count], float64, and a row of CANDIDATES. Its
docstring names the source. The papers choose single entries of a weight; here the entries of a unit are taken together.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import s2ft
from s2ft.attached.record import check_unattached
from s2ft.model.coupling import Projection
from s2ft.model.parts import couplings_in_towers
from s2ft.model.registry import find_couplings
from s2ft.model.weights import weight_at
from s2ft.selection import (
    ALLOCATIONS,
    Selection,
    allowed_units,
    allowed_without_protected,
    requested_couplings,
    units_per_projection,
)
from s2ft.selection.batches import Calibration
from s2ft.selection.metrics import (
    METRICS,
    Request,
    Units,
    activation_scores,
    check_finite,
    gradient_scores,
    product_scores,
    root_mean_squares,
    shared_by_producers,
    weight_scores,
)

KEPT = 16  # one of so many singular values is kept by a low-rank approximation: 36 of 576
EXACT = 2048  # up to this many rows or columns, an eigenvalue decomposition takes at most seconds


@dataclass(frozen=True)
class ProtectedRequest(Request):
    """What a candidate scores. `calibration` is data of the task, `protect` is data that the base must not lose."""

    protect: Calibration | None = None

    @property
    def on_protected(self) -> Request:
        """The request with the protected data in place of the task's, so that a metric of s2ft reads them."""
        return replace(self, calibration=self.protect)


# ---- the candidates --------------------------------------------------------------------------------------


def principal(request: Request) -> Units:
    """Score by the norm of a unit's entries in the best approximation of its projection of low rank.

    Source: LIFT (arXiv 2506.00772). The rank, a sixteenth of the smaller side, is ours. Projections that share a weight
    are decomposed one by one.
    """
    return {name: inside.sqrt() for name, inside, _ in squares_inside_and_all(request)}


def off_principal(request: Request) -> Units:
    """Score by the share of a unit's squared norm that this approximation lacks, 1 for a unit without weights.

    Source: GeoRA (arXiv 2601.09361) and "The Path Not Taken" (arXiv 2511.08567). The share of a unit is ours.
    """
    return {
        name: (1 - inside / every).clamp(0, 1).where(every > 0, 1.0)
        for name, inside, every in squares_inside_and_all(request)
    }


def saliency(request: Request) -> Units:
    """Score by |sum of gradient × weight| over a unit, as the root mean square over the calibration sequences.

    Source: Molchanov et al., arXiv 1906.10771, equation 8.
    """

    def squares(gradient: Tensor, projection: Projection) -> Tensor:
        weight = weight_at(request.model, projection).matrix
        products = (gradient.double() * weight).movedim(projection.dim, 0).flatten(1).sum(1)
        elements = projection.elements(torch.arange(projection.count)).to(products.device)
        return by_unit(products[elements], projection).square()

    return root_mean_squares(request, squares)


def gradient_per_weight(request: Request) -> Units:
    """Score by the gradient norm for the weight norm. Source: GaLLoP (arXiv 2510.19778)."""
    return ratio(gradient_scores(request), weight_scores(request), damping=1e-9)


def shielded(request: ProtectedRequest) -> Units:
    """Score by weight norm × activation norm on protected data, of which the smallest are meant.

    Source: Source-Shielded Updates (arXiv 2512.04844), which freezes the half of the columns with the largest sums.
    """
    return product_scores(request.on_protected)


def shielded_gradient(request: ProtectedRequest) -> Units:
    """Score by `saliency` on the task for the need of the protected data, see `shielded`. The ratio is ours."""
    return ratio(saliency(request), product_scores(request.on_protected))


def fisher_ratio(request: ProtectedRequest) -> Units:
    """Score by the gradient norm on the task for that on protected data.

    Source: the empirical Fisher information as a measure of need (arXiv 1612.00796): the square of a gradient norm over
    single sequences is its trace of the unit. The ratio is ours.
    """
    return ratio(gradient_scores(request), gradient_scores(request.on_protected))


def task_activation(request: ProtectedRequest) -> Units:
    """Score by the activation norm on the task for that on protected data.

    Source: "TF-IDF" of activations (arXiv 2510.15103). The ratio is ours.
    """
    return ratio(activation_scores(request), activation_scores(request.on_protected))


@dataclass(frozen=True)
class Candidate:
    """How a candidate chooses.

    Attributes:
        score: Its function.
        calibrated: Whether it reads data of the task.
        protected: Whether it reads protected data.
        smallest: Whether the units with the smallest scores are meant.
    """

    score: Callable[[Any], Units]
    calibrated: bool = False
    protected: bool = False
    smallest: bool = False


CANDIDATES: dict[str, Candidate] = {
    "principal": Candidate(principal),
    "off_principal": Candidate(off_principal),
    "saliency": Candidate(saliency, calibrated=True),
    "gradient_per_weight": Candidate(gradient_per_weight, calibrated=True),
    "shielded": Candidate(shielded, protected=True, smallest=True),
    "shielded_gradient": Candidate(shielded_gradient, calibrated=True, protected=True),
    "fisher_ratio": Candidate(fisher_ratio, calibrated=True, protected=True),
    "task_activation": Candidate(task_activation, calibrated=True, protected=True),
}


# ---- scores ----------------------------------------------------------------------------------------------


def ratio(gain: Units, need: Units, damping: float = 1.0) -> Units:
    """Return gain / (need + damping × the projection's mean need) for every unit, 0 where both are 0 everywhere.

    Without damping the ratio would choose units that hardly do anything for either data: their need is nearly 0.
    """
    below = {name: need[name] + damping * need[name].mean() for name in gain}
    return {name: (values / below[name]).where(below[name] > 0, values) for name, values in gain.items()}


def squares_inside_and_all(request: Request) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield, for every projection, its name and two sums of squares of each unit, shape [count], float64.

    The first is that of the low-rank approximation, the second that of the weight. Weights that are spread over ranks
    are gathered, one at a time.
    """
    by_weight: dict[str, list[Projection]] = {}
    for projection in request.projections:
        by_weight.setdefault(projection.path, []).append(projection)
    for projections in by_weight.values():
        with weight_at(request.model, projections[0]).full() as weight:
            for projection in projections:
                matrix = weight_at(request.model, projection).view(weight)
                elements = projection.elements(torch.arange(projection.count)).to(matrix.device)
                rows = matrix.movedim(projection.dim, 0)[elements].flatten(1).double()
                yield projection.name, *(by_unit(one, projection) for one in (_inside(rows), rows.square().sum(1)))


def by_unit(elements: Tensor, projection: Projection) -> Tensor:
    """Return the sums over the elements of each unit, shape [count], on the CPU."""
    return elements.view(projection.count, projection.unit).sum(1).cpu()


def _inside(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row in the best approximation of low rank, shape [rows]."""
    rank = max(1, min(rows.shape) // KEPT)
    if min(rows.shape) > EXACT:  # by twice as many random directions; the result is deterministic
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(0)
            left, values, _ = torch.svd_lowrank(rows, q=min(2 * rank, *rows.shape), niter=4)
        return left[:, :rank].square() @ values[:rank].square()
    if rows.shape[0] <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending
        return vectors[:, -rank:].square() @ values[-rank:].clamp(min=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return (rows @ vectors[:, -rank:]).square().sum(1)


# ---- the choice ------------------------------------------------------------------------------------------


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
        protect: Batches of data that the base must not lose, in the same form. With `config.protect_ratio`, the units
            that the base needs most there are never chosen, by any name.

    Returns:
        The chosen units.

    Raises:
        ValueError: There is no such name, or data that it needs are missing, empty or do not fit the model.
    """
    protect = None if protect is None else list(protect)  # it may be read twice
    if name in METRICS:
        shield = protect if config.protect_ratio is not None else None
        needed = calibration if METRICS[name].calibrated else None
        return s2ft.select(model, replace(config, selection=name), needed, protect=shield)
    if name not in CANDIDATES:
        raise ValueError(f"name must be one of {', '.join([*METRICS, *CANDIDATES])}, got {name!r}")
    candidate = CANDIDATES[name]
    check_unattached(model)
    for data, needed, what in (
        (calibration, candidate.calibrated, "calibration"),
        (protect, candidate.protected or config.protect_ratio is not None, "protect"),
    ):
        if needed and data is None:
            raise ValueError(f"{name} needs {what} data: pass {what}, an iterable of batches")
    device = next(model.parameters()).device
    couplings = couplings_in_towers(model, find_couplings(model, config=config).couplings, config)
    request = ProtectedRequest(
        requested_couplings(couplings, config),
        config,
        model,
        Calibration(calibration, device) if candidate.calibrated else None,
        None if protect is None else Calibration(protect, device, "protect"),
    )
    allowed = _allowed(request)
    free = {path: int(units.sum()) for path, units in allowed.items()}
    budget = units_per_projection(request.couplings, config, model, free)
    scores = candidate.score(request)
    check_finite(name, scores)
    smallest = candidate.smallest != (config.order == "smallest")
    allocate = ALLOCATIONS[config.allocation]
    return Selection(allocate(request, shared_by_producers(request, scores), budget, allowed, smallest))


def _allowed(request: ProtectedRequest) -> Units:
    """Return the units that `exclude` and `protect_ratio` leave, as s2ft.select does."""
    config = request.config
    allowed = allowed_units(request.couplings, list(request.projections), config.exclude)
    if config.protect_ratio is None:
        return allowed
    has_ratios = config.budget is None and config.match_lora_rank is None
    budget = units_per_projection(request.couplings, config) if has_ratios else None
    return allowed_without_protected(request.on_protected, allowed, budget)
