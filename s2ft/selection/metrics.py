"""The metrics: random (the paper's default), weight, product and gradient; activation.py has one more.

A metric is a row of `METRICS` here and in s2ft/config.py. Its function returns, for every projection of the request by
name, the score of each unit, shape [count], float64, not negative.
"""

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from s2ft.distributed import full_values
from s2ft.model.coupling import Projection
from s2ft.model.gathering import gathered_forwards
from s2ft.model.weights import weight_at
from s2ft.selection.activation import activation_scores
from s2ft.selection.metric import Metric, Request, Units, squares_by_unit
from s2ft.selection.running import in_evaluation_mode, keep_checkpointing, loss_of, single_sequences


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
                purpose += "/global" if over_layers else ""
                seed = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little") >> 1
                generator = torch.Generator().manual_seed(seed)
                if over_layers:
                    scores[projection.name] = torch.rand(count, dtype=torch.float64, generator=generator)
                else:
                    drawn = torch.randperm(count, generator=generator)
                    scores[projection.name] = (count - 1 - drawn.argsort()).double()
    return scores


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


# ---- gradient (S²FT-G in the paper) ---------------------------------------------------------------------


def gradient_scores(request: Request) -> Units:
    """Return the gradient norm of each unit's weights, as the root mean square over the calibration sequences.

    A norm is the L2 norm of the gradient of one sequence's loss with respect to the unit's weights in the projection.
    Sequences (images, recordings) are processed one by one, so that the score does not depend on their batches. Squared
    norms are summed, because a sum of gradients would need a second copy of the weights. Only one weight gradient
    exists at a time: it is reduced and deleted as soon as the backward has computed it. A model that checkpoints its
    blocks also does so here. If the model is sharded, every rank runs it on the same sequences, and each gradient of a
    weight is gathered.
    """
    return root_mean_squares(
        request, lambda gradient, projection: squares_by_unit(gradient, projection.dim, projection)
    )


def root_mean_squares(request: Request, squares: Callable[[Tensor, Projection], Tensor]) -> Units:
    """Return a root mean square over the calibration sequences, for every unit.

    Args:
        request: What is scored, with calibration data.
        squares: (gradient of one sequence's loss with respect to a weight as outputs × inputs, projection) → the square
            of each unit's statistic, shape [count], float64.

    Returns:
        The scores by projection, shape [count], float64.

    Raises:
        ValueError: The model has no loss, no sequence has a label, or a projection gets no gradient.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    with (
        in_evaluation_mode(request.model),
        gathered_forwards(request.model) as gathered,
        ExitStack() as stack,
        torch.enable_grad(),
    ):
        request.model.requires_grad_(False)
        for weight, projections in _weights(request):
            leaf = gathered.leaf(weight).requires_grad_(True)
            collect = partial(_collect, request.model, projections, squares, sums)
            hook = leaf.register_post_accumulate_grad_hook(collect)
            stack.callback(hook.remove)
        for hook in keep_checkpointing(request.model):
            stack.callback(hook.remove)
        for batch in request.calibration.batches(request.model):
            for sequence in single_sequences(request.model, batch):
                loss_of(request.model, sequence).backward()
                count += 1
    if not count:
        raise ValueError("no calibration sequence has a label to predict, so its loss has no gradient")
    for projection in request.projections:
        if projection.name not in sums:
            raise ValueError(f"selection='gradient': the loss has no gradient with respect to {projection.name}")
    return {path: (total / count).sqrt().cpu() for path, total in sums.items()}


def _weights(request: Request) -> list[tuple]:
    """Return every weight with its projections. A tied weight has several."""
    found: dict[int, tuple] = {}
    for projection in request.projections:
        handle = weight_at(request.model, projection)
        weight = handle.tensor
        if not weight.is_floating_point() or handle.read_only:
            raise ValueError(f"selection='gradient' needs gradients of weights, and {projection.path} is quantized")
        found.setdefault(id(weight), (weight, []))[1].append(projection)
    return list(found.values())


def _collect(
    model: nn.Module,
    projections: list[Projection],
    squares: Callable[[Tensor, Projection], Tensor],
    sums: dict[str, Tensor],
    weight: nn.Parameter,
) -> None:
    """Add the squares of a weight's units to `sums`, and delete the gradient."""
    with full_values(weight.grad) as gradient:
        for projection in projections:
            found = squares(weight_at(model, projection).view(gradient), projection)
            sums[projection.name] = sums[projection.name] + found if projection.name in sums else found
    weight.grad = None


METRICS: dict[str, Metric] = {
    "random": Metric(random_scores, calibrated=False, ordered=False),
    "weight": Metric(weight_scores, calibrated=False),
    "activation": Metric(activation_scores, calibrated=True),
    "product": Metric(product_scores, calibrated=True),
    "gradient": Metric(gradient_scores, calibrated=True),
}
