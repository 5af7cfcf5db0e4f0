"""Units that the base needs on other data, which are therefore never trained.

What a unit adds to the base's activations there is its weight norm times its activation norm: the score of the metric
`product`, and for a consumer's columns that of Wanda. SSU (arXiv 2512.04844) freezes the half of the columns with the
largest scores on source data, and loses a seventh of what full fine-tuning loses there.
"""

from dataclasses import replace

from s2ft.config import PROTECTED, S2FTConfig
from s2ft.model.coupling import Projection
from s2ft.selection.allocation import best_first, check_enough
from s2ft.selection.metric import Request, Units, check_finite, shared_by_producers
from s2ft.selection.metrics import product_scores


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
    ratio = request.config.protect_ratio
    if budget is not None:
        _check_before(request, allowed, budget, ratio)
    scores = shared_by_producers(request, product_scores(request))
    check_finite("protect", scores)
    kept = {}
    for projection in request.projections:
        mask = allowed[projection.name].clone()
        mask[best_first(scores[projection.name], smallest=False)[: protected_count(projection, ratio)]] = False
        kept[projection.name] = mask
    return kept


def protected_count(projection: Projection, ratio: float) -> int:
    """Return the number of protected units of a projection, rounded down."""
    return int(ratio * projection.count + 1e-9)


def _check_before(request: Request, allowed: Units, budget: dict[str, int], ratio: float) -> None:
    """Raise ValueError if the protected units leave too few, whichever they are."""
    groups: dict[str, list[Projection]] = {}
    for projection in request.projections:
        name = projection.name if request.config.allocation == "uniform" else projection.key
        groups.setdefault(name, []).append(projection)
    for projections in groups.values():
        left = sum(min(int(allowed[p.name].sum()), p.count - protected_count(p, ratio)) for p in projections)
        check_enough(projections, sum(budget[p.name] for p in projections), left, request.config)
