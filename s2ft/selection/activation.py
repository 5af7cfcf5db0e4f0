"""Selection by activation norm (paper, S²FT-A)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from s2ft.layers import ObservedExperts, experts_forward, kind_of
from s2ft.model.coupling import Projection
from s2ft.model.weights import find, parameter_position, put
from s2ft.selection.calibration import hooks_removed, run_forward, stack_of, undisturbed
from s2ft.selection.metric import Request, squares_by_unit


def activation_scores(request: Request) -> dict[str, Tensor]:
    """The L2 norm of a unit's activation over the calibration tokens, divided by the root of their number. Where the
    module sees other positions, such as image patches or sound frames, over those; of an expert the tokens that do
    not come to it count as zeros.

    A unit's activation is what it passes on: for the consumer its part of the input, for a producer its part of
    the output (that of q, k, v, up, gate themselves, before anything follows). All elements that a unit spans
    count; padding doesn't. No activation is kept: each is reduced to a sum of squares where it appears.
    """
    sums = _Sums(request)
    with undisturbed(request.model), _experts_observed(request), hooks_removed() as hooks, torch.no_grad():
        for path, projections in _by_path(request).items():
            hooks += sums.watch(path, projections)
        for batch in request.calibration.batches(request.model):
            run_forward(request.model, batch)
    return sums.scores()


class _Sums:
    """Sums of squares of every projection's units, and over how many positions."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # those of an encoder are not those of its decoder
        self.stacks = {
            projection.name: stack_of(request.model, coupling, projection)
            for coupling in request.couplings
            for projection in coupling.projections
        }

    def watch(self, path: str, projections: list[Projection]) -> list:
        """Hooks that add up what passes; projections: of the weight `path`, all of one side."""
        module = find(self.request.model, path)
        if isinstance(module, ObservedExperts):
            owner = find(self.request.model, path.rpartition(".")[0])
            return [
                owner.register_forward_hook(lambda _, inputs, output: self._count(projections, inputs[0])),
                module.register_forward_hook(lambda _, inputs, output: self._add_expert(projections, inputs, output)),
            ]
        consumes = projections[0].dim == 1
        return [
            module.register_forward_hook(
                lambda _, inputs, output: self._add(
                    projections, kind_of(module).features_last(module, inputs[0] if consumes else output)
                )
            )
        ]

    def _positions(self, projections: list[Projection], x: Tensor) -> Tensor:
        """x [..., features] without padding: [positions, features]."""
        return self.request.calibration.counted(x.detach(), projections[0].name, self.stacks[projections[0].name])

    def _count(self, projections: list[Projection], x: Tensor) -> None:
        count = len(self._positions(projections, x))
        for projection in projections:
            self.counts[projection.name] = self.counts.get(projection.name, 0) + count

    def _add(self, projections: list[Projection], x: Tensor) -> None:
        self._count(projections, x)
        x = self._positions(projections, x)
        for projection in projections:
            self._add_squares(projection, x)

    def _add_expert(self, projections: list[Projection], inputs: tuple, output: Tensor) -> None:
        x, expert, tokens = inputs
        for projection in projections:
            if projection.expert == expert:
                passed = (output if projection.dim == 0 else x).detach()
                stack = self.stacks[projection.name]
                self._add_squares(projection, self.request.calibration.counted(passed, projection.name, stack, tokens))

    def _add_squares(self, projection: Projection, x: Tensor) -> None:
        squares = squares_by_unit(x, 1, projection)
        before = self.sums.get(projection.name)
        self.sums[projection.name] = squares if before is None else before + squares

    def scores(self) -> dict[str, Tensor]:
        """By projection [count] float64. Raises: ValueError for one that saw nothing."""
        scores = {}
        for projection in self.request.projections:
            name, count = projection.name, self.counts.get(projection.name)
            if not count:
                passed = "passed" if count is None else "has more than padding for"
                raise ValueError(f"selection={self.request.config.selection!r}: no calibration batch {passed} {name}")
            none = torch.zeros(projection.count, dtype=torch.float64)  # an expert that no token came to
            scores[name] = (self.sums.get(name, none) / count).sqrt().cpu()
        return scores


def _by_path(request: Request) -> dict[str, list[Projection]]:
    found: dict[str, list[Projection]] = {}
    for projection in request.projections:
        found.setdefault(projection.path, []).append(projection)
    return found


@contextmanager
def _experts_observed(request: Request) -> Iterator[None]:
    """Inside, the requested stacks of experts are modules, run one expert after the other, so that hooks see what
    passes each; afterwards everything is in its place again."""
    paths = [path for path, projections in _by_path(request).items() if projections[0].expert is not None]
    with ExitStack() as back:
        for path in paths:
            parameter, place = find(request.model, path), parameter_position(request.model, path)
            back.callback(put, request.model, path, parameter, place)  # first, for an interrupt may come between
            put(request.model, path, ObservedExperts(parameter))
        for path in dict.fromkeys(path.rpartition(".")[0] for path in paths):
            owner = find(request.model, path)
            before = owner.__dict__.get("forward")
            back.callback(_set_forward, owner, before)
            owner.forward = MethodType(experts_forward, owner)
        yield


def _set_forward(module: nn.Module, forward: Callable | None) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = forward
