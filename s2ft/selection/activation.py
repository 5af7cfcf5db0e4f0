"""Selection by activation norm (paper, S²FT-A)."""
from typing import Dict

import torch
from torch import Tensor

from s2ft.coupling import Projection
from s2ft.selection.calibration import hooks_removed, run_forward, stack_of, undisturbed
from s2ft.selection.metric import Request, squares_by_unit


def activation_scores(request: Request) -> Dict[str, Tensor]:
    """The L2 norm of a unit's activation over the calibration tokens, divided by the root of their number. Where the
    module sees other positions, such as image patches or sound frames, over those.

    A unit's activation is what it passes on: for the consumer its part of the input, for a producer its part of
    the output (that of q, k, v, up, gate themselves, before anything follows). All elements that a unit spans
    count; padding doesn't. No activation is kept: each is reduced to a sum of squares where it appears.
    """
    sums: Dict[str, Tensor] = {}
    counts: Dict[str, int] = {}   # of positions: those of an encoder are not those of its decoder
    calibration = request.calibration
    stacks = {projection.name: stack_of(request.model, coupling, projection)
              for coupling in request.couplings for projection in coupling.projections}

    def add(projection: Projection, x: Tensor) -> None:
        x = calibration.counted(x.detach(), projection.name, stacks[projection.name])   # [positions, features]
        counts[projection.name] = counts.get(projection.name, 0) + len(x)
        squares = squares_by_unit(x, 1, projection)
        sums[projection.name] = sums[projection.name] + squares if projection.name in sums else squares

    with undisturbed(request.model), hooks_removed() as hooks, torch.no_grad():
        for projection in request.projections:
            hooks.append(_watch(request.model.get_submodule(projection.path), projection, add))
        for batch in calibration.batches(request.model):
            run_forward(request.model, batch)
    return {path: (total / counts[path]).sqrt().cpu() for path, total in _all(request, sums, counts).items()}


def _watch(linear, projection: Projection, add):
    if projection.dim == 1:
        return linear.register_forward_pre_hook(lambda module, inputs: add(projection, inputs[0]))
    return linear.register_forward_hook(lambda module, inputs, output: add(projection, output))


def _all(request: Request, sums: Dict[str, Tensor], counts: Dict[str, int]) -> Dict[str, Tensor]:
    for projection in request.projections:
        if not counts.get(projection.name):
            passed = "passed" if projection.name not in sums else "has more than padding for"
            raise ValueError(f"selection={request.config.selection!r}: no calibration batch {passed} {projection.name}")
    return sums
