"""The interface of metrics and allocations, and the functions that the metrics share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ft.config import S2FTConfig
from s2ft.files.tables import by_key
from s2ft.layers.split import Split
from s2ft.model.coupling import Coupling, Projection
from s2ft.selection.batches import Calibration

PIECE = 2**18  # number of elements converted at a time: they fit into the cache, and no copy of a weight is made

Units = dict[str, Tensor]  # a tensor by projection name


@dataclass(frozen=True)
class Request:
    """What a metric scores: the projections of `couplings` that `config` requests."""

    couplings: list[Coupling]  # couplings of the requested layers
    config: S2FTConfig
    model: nn.Module | None = None
    calibration: Calibration | None = None

    @property
    def projections(self) -> Iterator[Projection]:
        for coupling in self.couplings:
            yield from (projection for projection in coupling.projections if projection.key in self.config.ratios)

    def by_path(self) -> dict[str, list[Projection]]:
        """The projections by the path of their weight, which several may share."""
        return by_key((projection.path, projection) for projection in self.projections)


@dataclass(frozen=True)
class Metric:
    """A way to score units.

    Attributes:
        score: Returns, for every projection of the request by name, the score of each unit, shape [count], float64, not
            negative.
        calibrated: True if the metric needs calibration data.
        ordered: False if the scores have no meaning, so that `order` does not apply.
    """

    score: Callable[[Request], Units]
    calibrated: bool
    ordered: bool = True


# (request, scores, number of units by projection, masks of the allowed units, take the smallest scores) → chosen units
Allocation = Callable[[Request, Units, dict[str, int], Units, bool], Units]


@torch.no_grad()
def squares_by_unit(matrix: Tensor, dim: int, projection: Projection, split: Split | None = None) -> Tensor:
    """Return the sum of squares of every unit of a projection.

    The sums are formed in float32 within a piece of the matrix, and in float64 over the pieces.

    Args:
        matrix: Tensor of shape [O, I] or [O, I, taps].
        dim: Dimension of the units in `matrix`.
        projection: The projection.
        split: How tensor parallelism has split the units; None if it has not. The matrix may then be this rank's part.

    Returns:
        The sums, shape [count], float64, on the matrix's device. With a split, those of other ranks' units are zero.
    """
    rows = max(1, PIECE // max(1, matrix[:1].numel()))
    total = torch.zeros(matrix.shape[dim], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], rows):
        squares = matrix[start : start + rows].to(torch.promote_types(matrix.dtype, torch.float32)).square()
        if dim == 0:
            total[start : start + rows] = squares.flatten(1).sum(1)
        else:
            total += squares.transpose(0, 1).flatten(1).sum(1) if matrix.dim() > 2 else squares.sum(0)
    if split is not None:
        own, part = split.own_elements.to(total.device), total
        total = total.new_zeros(projection.extent)
        total[own] = part if part.numel() == own.numel() else part[own]
    elements = projection.elements(torch.arange(projection.count)).to(total.device)
    return total[elements].view(projection.count, projection.unit).sum(1)


def shared_by_producers(request: Request, scores: Units) -> Units:
    """Give all requested producers of a coupling with the same units one score: the root of their sum of squares.

    Their rankings are then the same and their selections nested, so that each selection is contiguous after
    co-permutation. The consumer keeps its own scores.
    """
    shared = dict(scores)
    for coupling in request.couplings:
        groups = by_key((producer.count, producer.name) for producer in coupling.producers if producer.name in scores)
        for paths in groups.values():
            together = torch.stack([scores[path] for path in paths]).square().sum(0).sqrt()
            shared.update((path, together) for path in paths)
    return shared


def check_finite(user: str, scores: Units) -> None:
    """Raise ValueError for scores that are NaN or infinite. `user` is what needs them, for the message."""
    for path, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{user}: the statistics of {path} are NaN or infinite")
