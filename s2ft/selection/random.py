"""Random selection (paper's default, S²FT-R)."""
import hashlib
from typing import Dict, List

import torch
from torch import Tensor

from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling


def random_rankings(couplings: List[Coupling], config: S2FTConfig) -> Dict[str, Tensor]:
    """A seeded random ranking of the units of every projection.

    Producers with the same units share a ranking, so that their selections are nested and come out
    contiguous after co-permutation; the consumer draws its own. Every draw is seeded by what it is
    for, so the units of one layer do not depend on which other layers or projections are trained.
    """
    rankings = {}
    for coupling in couplings:
        for projection in coupling.projections:
            side = ("producers", "consumer")[projection.dim]
            what = f"{config.seed}/{coupling.kind}/{coupling.layer}/{side}/{projection.count}"
            seed = int.from_bytes(hashlib.sha256(what.encode()).digest()[:8], "little") >> 1
            generator = torch.Generator().manual_seed(seed)
            rankings[projection.path] = torch.randperm(projection.count, generator=generator)
    return rankings
