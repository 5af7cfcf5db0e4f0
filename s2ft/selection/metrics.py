"""The metrics, and those that need no run of the model: random (the paper's default), weight, and product.

A metric is a row of `METRICS` here and in s2ft/config.py. Its function returns, for every projection of the request by
name, the score of each unit, shape [count], float64, not negative.
"""

import hashlib

import torch

from s2ft.model.weights import weight_at
from s2ft.selection.activation import activation_scores
from s2ft.selection.gradient import gradient_scores
from s2ft.selection.metric import Metric, Request, Units, squares_by_unit


def random_scores(request: Request) -> Units:
    """Return a seeded random ranking of the units of each projection. The first unit drawn has the highest score.

    Producers with the same units share a ranking. Their selections are therefore nested and contiguous after
    co-permutation. The consumer has a ranking of its own. The seed of a draw contains the coupling and the side, so the
    units of a layer do not depend on the other layers and projections that are trained.

    With allocation "global", scores are compared between layers. Each unit then gets a random number between 0 and 1 of
    its own. The units with the highest ones are a draw from all units of all layers, without replacement.
    """
    over_layers = request.config.allocation == "global"
    scores = {}
    for coupling in request.couplings:
        for projection in coupling.projections:
            if projection.key in request.config.ratios:
                side, count = ("producers", "consumer")[projection.dim], projection.count
                purpose = f"{request.config.seed}/{coupling.kind}/{coupling.layer}/{side}/{count}"
                purpose += "" if projection.expert is None else f"/{projection.expert}"
                purpose += f"/{projection.path}" if projection.key == "l" else ""  # a layer has many of one kind
                generator = _generator(f"{purpose}/global" if over_layers else purpose)
                if over_layers:
                    scores[projection.name] = torch.rand(count, dtype=torch.float64, generator=generator)
                else:
                    drawn = torch.randperm(count, generator=generator)
                    scores[projection.name] = (count - 1 - drawn.argsort()).double()
    return scores


def _generator(purpose: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def weight_scores(request: Request) -> Units:
    """Return the L2 norm of each unit's weights: its rows in a producer's weight, its columns in the consumer's.

    This is S²FT-W of the paper. Biases do not count. Weights that are spread over ranks are gathered, one at a time.
    """
    scores = {}
    for projections in request.by_path().values():
        with weight_at(request.model, projections[0]).full() as weight:
            for projection in projections:
                matrix = weight_at(request.model, projection).view(weight)
                scores[projection.name] = squares_by_unit(matrix, projection.dim, projection).sqrt().cpu()
    return {projection.name: scores[projection.name] for projection in request.projections}


def product_scores(request: Request) -> Units:
    """Return the product of each unit's weight norm and activation norm in a projection (S²FT-S in the paper)."""
    activations = activation_scores(request)
    return {path: weights * activations[path] for path, weights in weight_scores(request).items()}


METRICS: dict[str, Metric] = {
    "random": Metric(random_scores, calibrated=False, ordered=False),
    "weight": Metric(weight_scores, calibrated=False),
    "activation": Metric(activation_scores, calibrated=True),
    "product": Metric(product_scores, calibrated=True),
    "gradient": Metric(gradient_scores, calibrated=True),
}
