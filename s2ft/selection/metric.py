"""What every metric gets and gives, and the norms they share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling, Projection
from s2ft.selection.calibration import Calibration

PIECE = 2**18  # elements that are converted at a time: they stay in the cache, and no copy of a weight is made


@dataclass(frozen=True)
class Request:
    """What is to be scored: the projections of `couplings` that `config` asks for."""

    couplings: list[Coupling]  # of the layers that are asked for
    config: S2FTConfig
    model: nn.Module | None = None
    calibration: Calibration | None = None

    @property
    def projections(self) -> Iterator[Projection]:
        for coupling in self.couplings:
            yield from (projection for projection in coupling.projections if projection.key in self.config.ratios)


@dataclass(frozen=True)
class Metric:
    """score: for every projection of the request, by path, a score of each unit [count] float64, not negative."""

    score: Callable[[Request], dict[str, Tensor]]
    calibrated: bool  # needs calibration data
    ordered: bool = True  # largest and smallest mean something


@torch.no_grad()
def squares_by_unit(matrix: Tensor, dim: int, projection: Projection) -> Tensor:
    """Sum of squares of every unit of the projection, [count] float64 on the matrix's device, of matrix [O, I] or
    [O, I, taps] with the units along `dim`. Float32 within a piece of the matrix, float64 over the pieces."""
    rows = max(1, PIECE // max(1, matrix[:1].numel()))
    total = torch.zeros(matrix.shape[dim], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], rows):
        squares = matrix[start : start + rows].to(_wide(matrix.dtype)).square()
        if dim == 0:
            total[start : start + rows] = squares.flatten(1).sum(1)
        else:
            total += squares.transpose(0, 1).flatten(1).sum(1) if matrix.dim() > 2 else squares.sum(0)
    elements = projection.elements(torch.arange(projection.count)).to(total.device)
    return total[elements].view(projection.count, projection.unit).sum(1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def shared_by_producers(request: Request, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """One score for all requested producers of a coupling that have the same units: the root of the sum of their
    squares. So their rankings are the same, their selections nested, and each contiguous when units move.
    The consumer keeps its own."""
    shared = dict(scores)
    for coupling in request.couplings:
        groups: dict[int, list[str]] = {}
        for producer in coupling.producers:
            if producer.name in scores:
                groups.setdefault(producer.count, []).append(producer.name)
        for paths in groups.values():
            together = torch.stack([scores[path] for path in paths]).square().sum(0).sqrt()
            shared.update((path, together) for path in paths)
    return shared
