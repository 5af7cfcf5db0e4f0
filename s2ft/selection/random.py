"""Random selection (S²FT-R, the paper's default)."""

import hashlib

import torch
from torch import Tensor

from s2ft.selection.metric import Metric, Request, Units


def random_scores(request: Request) -> Units:
    """Return a seeded random ranking of the units of each projection. The first unit drawn has the highest score.

    Producers with the same units share a ranking. Their selections are therefore nested and contiguous after
    co-permutation. The consumer has a ranking of its own. The seed of a draw contains the coupling and the side, so the
    units of a layer do not depend on the other layers and projections that are trained.

    With allocation "global", scores are compared between layers. Each unit then gets a random number between 0 and 1 of
    its own. The units with the highest ones are a draw from all units of all layers, without replacement.
    """
    draw = _numbers if request.config.allocation == "global" else _ranks
    scores = {}
    for coupling in request.couplings:
        for projection in coupling.projections:
            if projection.key in request.config.ratios:
                side = ("producers", "consumer")[projection.dim]
                purpose = f"{request.config.seed}/{coupling.kind}/{coupling.layer}/{side}/{projection.count}"
                purpose += "" if projection.expert is None else f"/{projection.expert}"
                purpose += f"/{projection.path}" if projection.key == "l" else ""  # a layer has many of one kind
                scores[projection.name] = draw(purpose, projection.count)
    return scores


def _generator(purpose: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def _numbers(purpose: str, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=_generator(f"{purpose}/global"))


def _ranks(purpose: str, count: int) -> Tensor:
    drawn = torch.randperm(count, generator=_generator(purpose))
    ranks = torch.empty(count, dtype=torch.float64)
    ranks[drawn] = torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return ranks


METRIC = Metric(random_scores, calibrated=False, ordered=False)
