"""Selection by activation norm (S²FT-A in the paper)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.distributed import is_dtensor
from s2ft.distributed.fsdp import following
from s2ft.layers import ObservedExperts, forward_of, kind_of
from s2ft.model.coupling import Projection
from s2ft.model.gathering import gathered_forwards
from s2ft.model.weights import find, parameter_position, put, split_of_units
from s2ft.selection.batches import positions_of
from s2ft.selection.metric import Request, Units, squares_by_unit
from s2ft.selection.running import in_evaluation_mode, run_forward


def activation_scores(request: Request) -> Units:
    """Return the activation norm of each unit, as the root mean square over the positions of the calibration data.

    The activation of a producer's unit is its part of the projection's output, before any other operation. The
    activation of a consumer's unit is its part of the input. The norm is the L2 norm over all elements of the unit.
    Positions are tokens, or other positions such as image patches or sound frames. Padding does not
    count. For an expert, tokens that the router sends elsewhere count as zeros. No activation is stored: each is
    reduced to a sum of squares when it is computed.
    """
    sums = _Sums(request)
    with (
        in_evaluation_mode(request.model),
        _experts_observed(request),
        gathered_forwards(request.model),
        ExitStack() as stack,
        torch.no_grad(),
    ):
        for path, projections in request.by_path().items():
            for hook in sums.watch(path, projections):
                stack.callback(hook.remove)
        for batch in request.calibration.batches(request.model):
            run_forward(request.model, batch)
    return sums.scores()


class _Sums:
    """Sums of squares of the units of every projection, and the number of positions in each sum."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # by projection, because an encoder and its decoder have different positions
        self.positions = {
            projection.name: positions_of(request.model, coupling, projection)
            for coupling in request.couplings
            for projection in coupling.projections
        }

    def watch(self, path: str, projections: list[Projection]) -> list:
        """Register hooks that sum the activations of the weight `path`. All projections must be on one side."""
        module = find(self.request.model, path)
        if isinstance(module, ObservedExperts):
            owner = find(self.request.model, path.rpartition(".")[0])

            def count(module: nn.Module, inputs: tuple, output: Any) -> None:
                self._counted(projections, inputs[0])

            return [
                owner.register_forward_hook(count),
                module.register_forward_hook(lambda _, inputs, output: self._add_experts(projections, inputs, output)),
            ]
        consumes = projections[0].dim == 1
        return [
            module.register_forward_hook(
                lambda _, inputs, output: self._add(
                    projections, kind_of(module).features_last(module, inputs[0] if consumes else output)
                )
            )
        ]

    def _counted(self, projections: list[Projection], x: Tensor) -> Tensor:
        """Count the positions of x and return it without padding: [..., features] → [positions, features]."""
        name, x = projections[0].name, x.detach()
        x = x.to_local() if is_dtensor(x) else x  # as torch's parallelize_module gives it to a layer
        x = self.request.calibration.without_padding(x, name, self.positions[name])
        for projection in projections:
            self.counts[projection.name] = self.counts.get(projection.name, 0) + len(x)
        return x

    def _add(self, projections: list[Projection], x: Tensor) -> None:
        x = self._counted(projections, x)
        for projection in projections:
            self._add_squares(projection, x)

    def _add_experts(self, projections: list[Projection], inputs: tuple, output: Tensor) -> None:
        """Add what the experts of one weight got or returned. Their rows stand one after the other."""
        x, offsets, tokens = inputs
        ends = [0, *offsets.tolist()]
        for projection in projections:
            rows = slice(ends[projection.expert], ends[projection.expert + 1])
            values = (output if projection.dim == 0 else x).detach()[rows]
            here = None if tokens is None else tokens[rows]
            positions = self.positions[projection.name]
            values = self.request.calibration.without_padding(values, projection.name, positions, here)
            self._add_squares(projection, values)

    def _add_squares(self, projection: Projection, x: Tensor) -> None:
        squares = squares_by_unit(x, 1, projection, split_of_units(self.request.model, projection))
        self.sums[projection.name] = self.sums.get(projection.name, 0) + squares

    def scores(self) -> Units:
        """Return the scores by projection, shape [count], float64.

        Raises:
            ValueError: A projection was never run, or only on padding.
        """
        scores = {}
        for projection in self.request.projections:
            name, count = projection.name, self.counts.get(projection.name)
            if not count:
                problem = "ran" if count is None else "has more than padding for"
                data = self.request.calibration.name
                user = "" if data == "protect" else f"selection={self.request.config.selection!r}: "
                raise ValueError(f"{user}no {data} batch {problem} {name}")
            # an expert may have received no token
            total = self.sums.get(name, torch.zeros(projection.count, dtype=torch.float64))
            split = split_of_units(self.request.model, projection)
            if split is not None:  # each rank has the sums of its own units
                total = split.sum(total)
            scores[name] = (total / count).sqrt().cpu()
        return scores


@contextmanager
def _experts_observed(request: Request) -> Iterator[None]:
    """Replace the requested parameters of experts by modules, so that hooks see what each expert gets and returns.

    Everything is restored afterwards.
    """
    stacks = {path: found[0] for path, found in request.by_path().items() if found[0].expert is not None}
    with ExitStack() as stack:
        for path, projection in stacks.items():
            parameter, place = find(request.model, path), parameter_position(request.model, path)
            stack.callback(put, request.model, path, parameter, place)  # before put, because an interrupt may follow
            observed, owner = ObservedExperts(parameter, projection.transposed), path.rpartition(".")
            put(request.model, path, observed)
            there, here = (observed, "weight"), (find(request.model, owner[0]), owner[2])
            stack.enter_context(following(request.model, here, there))
        for path in dict.fromkeys(path.rpartition(".")[0] for path in stacks):
            owner = find(request.model, path)
            if (before := owner.__dict__.get("forward")) is None:
                stack.callback(owner.__dict__.pop, "forward", None)
            else:
                stack.callback(setattr, owner, "forward", before)
            owner.forward = MethodType(forward_of(owner), owner)
        yield
