"""From scores to units: the best of every projection, or the best over all layers."""

import torch
from torch import Tensor

from s2ft.model.coupling import Projection, unit_name
from s2ft.selection.budget import unit_parameters
from s2ft.selection.metric import Request

Units = dict[str, Tensor]  # by module path


def uniform(request: Request, scores: Units, budget: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Of every projection the best units, as many as `budget` says."""
    chosen = {}
    for projection in request.projections:
        path, units = projection.name, budget[projection.name]
        if units:
            ranking = best_first(scores[path], smallest)
            ranking = ranking[allowed[path][ranking]]
            _check_enough([projection], units, ranking.numel())
            chosen[path] = ranking[:units].sort().values
    return chosen


def over_layers(request: Request, scores: Units, budget: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Of every kind of projection the best units over all its layers, as many parameters as `budget` comes to.

    Scores are compared as they are, not normalised by layer: a layer may get none or all. Of equal units the one
    of the lower layer, then of the lower number, comes first.
    """
    chosen: Units = {}
    groups: dict[str, list[Projection]] = {}
    for projection in request.projections:
        groups.setdefault(projection.key, []).append(projection)
    for projections in groups.values():
        _check_enough(
            projections, sum(budget[p.name] for p in projections), sum(int(allowed[p.name].sum()) for p in projections)
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
    """Which units of `projections`, one after the other [units], are taken."""
    costs = {p.name: unit_parameters(request.model, p) for p in projections}
    parameters = sum(costs[p.name] * budget[p.name] for p in projections)
    ranking = best_first(torch.cat([scores[p.name] for p in projections]), smallest)
    ranking = ranking[torch.cat([allowed[p.name] for p in projections])[ranking]]
    cost = torch.cat([torch.full((p.count,), costs[p.name]) for p in projections])
    taken = torch.zeros(cost.numel(), dtype=torch.bool)
    taken[ranking[cost[ranking].cumsum(0) <= parameters]] = True
    return taken


def best_first(scores: Tensor, smallest: bool) -> Tensor:
    """Units by score [n]; of equal ones the lower number comes first."""
    return scores.argsort(descending=not smallest, stable=True)


def _check_enough(projections: list[Projection], asked: int, there: int) -> None:
    if asked > there:
        where = projections[0].path if len(projections) == 1 else f"the layers' {projections[0].key} projections"
        raise ValueError(
            f"exclude leaves {there} {unit_name(projections[0])} of {where} to choose from; {asked} are asked for"
        )


ALLOCATIONS = {"uniform": uniform, "global": over_layers}
