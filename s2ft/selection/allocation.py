"""Allocations: how many units each projection gets, and which ones. Each is a row here and in s2ft/config.py."""

import torch
from torch import Tensor

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Projection, unit_name
from s2ft.selection.budget import unit_parameters
from s2ft.selection.metric import Allocation, Request, Units


def best_first(scores: Tensor, smallest: bool) -> Tensor:
    """Return the units in the order of their scores, shape [n]. Units with the same score keep their order."""
    return scores.argsort(descending=not smallest, stable=True)


def check_enough(projections: list[Projection], requested: int, available: int, config: S2FTConfig) -> None:
    """Raise ValueError if fewer units are available than requested. The message names the options that take units."""
    if requested > available:
        takers = ["exclude"] if config.exclude is not None or config.protect_ratio is None else []
        takers += [] if config.protect_ratio is None else [f"protect_ratio={config.protect_ratio:g}"]
        where = projections[0].path if len(projections) == 1 else f"the layers' {projections[0].key} projections"
        raise ValueError(
            f"{' and '.join(takers)} leave{'s' * (len(takers) == 1)} {available} {unit_name(projections[0])} of "
            f"{where} to choose from; {requested} are requested"
        )


def uniform(request: Request, scores: Units, budget: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Return the best units of every projection, as many as the budget gives it."""
    chosen = {}
    for projection in request.projections:
        path, units = projection.name, budget[projection.name]
        if units:
            ranking = best_first(scores[path], smallest)
            ranking = ranking[allowed[path][ranking]]
            check_enough([projection], units, ranking.numel(), request.config)
            chosen[path] = ranking[:units].sort().values
    return chosen


def over_layers(request: Request, scores: Units, budget: dict[str, int], allowed: Units, smallest: bool) -> Units:
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
        costs = [unit_parameters(request.model, p) for p in projections]
        parameters = sum(cost * budget[p.name] for p, cost in zip(projections, costs))
        sizes = torch.tensor([p.count for p in projections])
        cost = torch.tensor(costs).repeat_interleave(sizes)  # of each unit, one projection after the other
        ranking = best_first(torch.cat([scores[p.name] for p in projections]), smallest)
        ranking = ranking[torch.cat([allowed[p.name] for p in projections])[ranking]]
        taken = torch.zeros(cost.numel(), dtype=torch.bool)
        taken[ranking[cost[ranking].cumsum(0) <= parameters]] = True
        for projection, mask in zip(projections, taken.split(sizes.tolist())):
            if bool(mask.any()):
                chosen[projection.name] = mask.nonzero().squeeze(1)
    return chosen


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "global": over_layers}
