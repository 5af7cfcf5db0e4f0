"""Which units may be chosen: those that the config names, and not those that it excludes or that the base needs.

What a unit adds to the base's activations on other data is its weight norm times its activation norm there: the score
of the metric `product`, and for a consumer's columns that of Wanda. SSU (arXiv 2512.04844) freezes the half of the
columns with the largest scores on source data, and loses a seventh of what full fine-tuning loses there.
"""

from dataclasses import replace

import torch
from torch import Tensor

from s2ft.config import PROTECTED, S2FTConfig
from s2ft.files.tables import by_key
from s2ft.model.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.selection.budget import best_first, check_enough
from s2ft.selection.metric import Request, Units, check_finite, shared_by_producers
from s2ft.selection.metrics import product_scores
from s2ft.selection.selection import unit_tensors


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
