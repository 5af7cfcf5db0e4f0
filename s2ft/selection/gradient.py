"""Selection by gradient norm (S²FT-G in the paper)."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from s2ft.distributed import full_values
from s2ft.model.coupling import Projection
from s2ft.model.gathering import gathered_forwards
from s2ft.model.weights import weight_at
from s2ft.selection.metric import Request, Units, squares_by_unit
from s2ft.selection.running import in_evaluation_mode, keep_checkpointing, loss_of, single_sequences


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
            hook = leaf.register_post_accumulate_grad_hook(_collect(request.model, projections, squares, sums))
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
):
    """Return a hook that adds the squares of a weight's units to `sums` and deletes the gradient."""

    def hook(weight: nn.Parameter) -> None:
        with full_values(weight.grad) as gradient:
            for projection in projections:
                found = squares(weight_at(model, projection).view(gradient), projection)
                sums[projection.name] = sums[projection.name] + found if projection.name in sums else found
        weight.grad = None

    return hook
