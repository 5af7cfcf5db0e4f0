"""Selection by gradient norm (paper, S²FT-G)."""

import torch
from torch import Tensor, nn

from s2ft.model.coupling import Projection
from s2ft.model.weights import weight_at
from s2ft.selection.calibration import checkpointing_kept, hooks_removed, loss_of, sequences, undisturbed
from s2ft.selection.metric import Request, squares_by_unit


def gradient_scores(request: Request) -> dict[str, Tensor]:
    """The root mean square, over the calibration sequences, of the L2 norm of the gradient of a sequence's loss
    with respect to a unit's weights in the projection.

    Sequences (images, recordings) are taken one by one, so that the score does not depend on how they are batched;
    squared norms are added up, not gradients, whose sum would need a second copy of the weights. Of all weight
    gradients one is alive at a time: it is reduced and dropped as soon as the backward has it. A model that
    checkpoints its blocks does so here too.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    with undisturbed(request.model), hooks_removed() as hooks, torch.enable_grad():
        request.model.requires_grad_(False)
        for weight, projections in _weights(request):
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(_collect(request.model, projections, sums)))
        hooks += checkpointing_kept(request.model)
        for batch in request.calibration.batches(request.model):
            for sequence in sequences(request.model, batch):
                loss_of(request.model, sequence).backward()
                count += 1
    if not count:
        raise ValueError("no calibration sequence has a label to predict: its loss has no gradient")
    for projection in request.projections:
        if projection.name not in sums:
            raise ValueError(f"selection='gradient': no gradient of the loss reaches {projection.name}")
    return {path: (total / count).sqrt().cpu() for path, total in sums.items()}


def _weights(request: Request) -> list[tuple]:
    """Every weight with its projections: more than one where they are tied."""
    found: dict[int, tuple] = {}
    for projection in request.projections:
        handle = weight_at(request.model, projection)
        weight = handle.tensor
        if not weight.is_floating_point() or handle.read_only:
            raise ValueError(f"selection='gradient' needs gradients of weights, and {projection.path} is quantized")
        found.setdefault(id(weight), (weight, []))[1].append(projection)
    return list(found.values())


def _collect(model: nn.Module, projections: list[Projection], sums: dict[str, Tensor]):
    def hook(weight: nn.Parameter) -> None:
        for projection in projections:
            squares = squares_by_unit(weight_at(model, projection).view(weight.grad), projection.dim, projection)
            sums[projection.name] = sums[projection.name] + squares if projection.name in sums else squares
        weight.grad = None

    return hook
