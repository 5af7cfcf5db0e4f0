"""Uniform allocation: every projection gets the number of units that the budget gives it."""

from s2ft.selection.allocation import best_first, check_enough
from s2ft.selection.metric import Request, Units


def allocate(request: Request, scores: Units, budget: dict[str, int], allowed: Units, smallest: bool) -> Units:
    """Return the best units of every projection."""
    chosen = {}
    for projection in request.projections:
        path, units = projection.name, budget[projection.name]
        if units:
            ranking = best_first(scores[path], smallest)
            ranking = ranking[allowed[path][ranking]]
            check_enough([projection], units, ranking.numel(), request.config)
            chosen[path] = ranking[:units].sort().values
    return chosen
