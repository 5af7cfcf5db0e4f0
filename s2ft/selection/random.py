"""Random selection (paper's default, S²FT-R)."""

import hashlib

import torch
from torch import Tensor

from s2ft.selection.metric import Request


def random_scores(request: Request) -> dict[str, Tensor]:
    """A seeded random ranking of the units of every projection: the unit drawn first scores highest.

    Producers with the same units share a ranking, so that their selections are nested and come out
    contiguous after co-permutation; the consumer draws its own. Every draw is seeded by what it is
    for, so the units of one layer do not depend on which other layers or projections are trained.
    """
    scores = {}
    for coupling in request.couplings:
        for projection in coupling.projections:
            if projection.key in request.config.ratios:
                side = ("producers", "consumer")[projection.dim]
                what = f"{request.config.seed}/{coupling.kind}/{coupling.layer}/{side}/{projection.count}"
                what += "" if projection.expert is None else f"/{projection.expert}"
                scores[projection.name] = _ranks(what, projection.count)
    return scores


def _ranks(what: str, count: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little") >> 1
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[drawn] = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return ranks
