"""How many units of each projection are trained, by a ratio or a number of parameters, and which ones: allocations."""

import math
from itertools import accumulate

import torch
from torch import Tensor, nn

from s2ft.config import PROJECTIONS, S2FTConfig
from s2ft.files.tables import by_key
from s2ft.model.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.model.weights import weight_at
from s2ft.selection.metric import Allocation, Request, Units


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
            may be chosen; or the config names a projection or layer that the model does not have.
    """
    requested = requested_projections(couplings, config)
    if config.budget is None and config.match_lora_rank is None:
        if config.selection == "random" and config.allocation == "global":
            return _units_over_layers(requested, config.ratios)
        return _aligned({p.name: _units(p, config.ratios[p.key]) for p in requested}, config.align)
    free = {p.name: p.count if free is None else free.get(p.name, p.count) for p in requested}
    costs = {p.name: unit_parameters(model, p) for p in requested}
    shares = {p.name: config.ratios[p.key] * p.count for p in requested}
    total, what = _budget(config, model, requested)
    most = sum(free[path] * costs[path] for path in free)
    if total > most:
        taken = "" if config.protect_ratio is None else f" with protect_ratio={config.protect_ratio:g}"
        raise ValueError(
            f"{what} is more than the {most:,} parameters that the requested projections have to choose "
            f"from{taken}: lower it, or request more projections"
        )
    units = _aligned(share_out(total, shares, free, costs), config.align)
    for p in requested:  # with allocation "global", one layer of each kind is enough
        alike = [p] if config.allocation == "uniform" else [other for other in requested if other.key == p.key]
        if not any(units[other.name] for other in alike):
            raise ValueError(
                f"{what} is too small: it leaves {p.name} no unit, and a unit of it has {costs[p.name]:,} "
                f"parameters. Raise it or {p.key}_ratio, or train fewer layers or projections"
            )
    return units


def _aligned(units: dict[str, int], align: int | None) -> dict[str, int]:
    """Round numbers of units down to multiples of `align`. What is smaller stays, so that nothing is left out."""
    return {name: number - number % align if align and number > align else number for name, number in units.items()}


def requested_projections(couplings: list[Coupling], config: S2FTConfig) -> list[Projection]:
    """Return the projections that the config's ratios and layers request.

    Raises:
        ValueError: The config requests nothing, or a projection or layer that the model does not have.
    """
    if not config.ratios:
        raise ValueError(
            "nothing is selected: set at least one of q_ratio, k_ratio, v_ratio, o_ratio, "
            "u_ratio, g_ratio, d_ratio, l_ratio above 0"
        )
    layers = requested_layers(couplings, config)
    found = {projection.key for projection in projections_of(couplings)}
    present = [key for key in PROJECTIONS if key in found]
    for key in config.ratios:
        if key not in found:
            raise ValueError(
                f"{key}_ratio requests a projection that this model does not have: it has {', '.join(present)}, so set "
                f"{' or '.join(f'{one}_ratio' for one in present)}"
            )
    return [
        projection
        for coupling in couplings
        if coupling.layer in layers
        for projection in coupling.projections
        if projection.key in config.ratios
    ]


def requested_layers(couplings: list[Coupling], config: S2FTConfig) -> set:
    """Return the layers to train.

    Raises:
        ValueError: The config names a layer that the model does not have.
    """
    known = {coupling.layer for coupling in couplings}
    if config.layers is None:
        return known
    unknown = sorted(set(config.layers) - known)
    if unknown:
        raise ValueError(f"layers names {unknown}, but the model has layers {min(known)} to {max(known)}")
    return set(config.layers)


def _units(projection: Projection, ratio: float) -> int:
    units = int(ratio * projection.count + 0.5)
    if projection.key == "l":  # layers of very different sizes share this ratio
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
    rank = config.match_lora_rank
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
    for projections in by_key((projection.key, projection) for projection in request.projections).values():
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
