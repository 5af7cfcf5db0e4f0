"""Global allocation: the layers compete for units, separately for each kind of projection."""

import torch
from torch import Tensor

from s2ft.model.coupling import Projection
from s2ft.selection.allocation import best_first, check_enough
from s2ft.selection.budget import unit_parameters
from s2ft.selection.metric import Request, Units


def allocate(request: Request, scores: Units, budget: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Return the best units over all layers for each kind of projection, with as many parameters as `budget` gives it.

    Scores are compared without normalising them by layer, so a layer may get no unit or all. Units with the same score
    are chosen in the order of their layers, then of their numbers.
    """
    chosen: Units = {}
    groups: dict[str, list[Projection]] = {}
    for projection in request.projections:
        groups.setdefault(projection.key, []).append(projection)
    for projections in groups.values():
        check_enough(
            projections,
            sum(budget[p.name] for p in projections),
            sum(int(allowed[p.name].sum()) for p in projections),
            request.config,
        )
        taken = _best_over(request, projections, scores, budget, allowed, smallest)
        sizes = [p.count for p in projections]
        for projection, mask in zip(projections, taken.split(sizes)):
            if bool(mask.any()):
                chosen[projection.name] = mask.nonzero().squeeze(1)
    return chosen


def _best_over(
    request: Request,
    projections: list[Projection],
    scores: Units,
    budget: dict[str, int],
    allowed: Units,
    smallest: bool,
) -> Tensor:
    """Return a mask of the chosen units over the units of all projections, one projection after the other."""
    costs = {p.name: unit_parameters(request.model, p) for p in projections}
    parameters = sum(costs[p.name] * budget[p.name] for p in projections)
    ranking = best_first(torch.cat([scores[p.name] for p in projections]), smallest)
    ranking = ranking[torch.cat([allowed[p.name] for p in projections])[ranking]]
    cost = torch.cat([torch.full((p.count,), costs[p.name]) for p in projections])
    taken = torch.zeros(cost.numel(), dtype=torch.bool)
    taken[ranking[cost[ranking].cumsum(0) <= parameters]] = True
    return taken
