"""Units with the largest weights after rank reduction.

Source: LIFT (Liu et al., ICML 2025, arXiv 2506.00772), which trains the entries with the largest magnitude in a
low-rank approximation of a weight. It scores single entries. Here a unit's entries are taken together, because S²FT
trains whole units. The share of the singular values that are kept is ours.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from s2ft.model.coupling import Projection
from s2ft.model.weights import weight_at
from s2ft.selection.metric import Metric, Request, Units

KEPT = 16  # one of so many singular values is kept: 36 of 576
EXACT = 2048  # up to this many rows or columns, an eigenvalue decomposition takes at most seconds
ROUNDS = 4  # power iterations of the randomized decomposition


def principal_scores(request: Request) -> Units:
    """Return the L2 norm of each unit's entries in the best approximation of its projection of low rank.

    The rank is a sixteenth of the smaller side of the projection, at least 1. Projections that share a weight are
    decomposed one by one, so that the scores do not depend on how a model stores them.

    Returns:
        The norms by projection, shape [count], float64.
    """
    return {name: inside.sqrt() for name, inside, _ in squares_inside_and_all(request)}


def squares_inside_and_all(request: Request) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield, for every projection, its name and two sums of squares of each unit, shape [count], float64.

    The first is that of the low-rank approximation, the second that of the weight. Weights that are spread over ranks
    are gathered, one at a time.
    """
    by_weight: dict[str, list[Projection]] = {}
    for projection in request.projections:
        by_weight.setdefault(projection.path, []).append(projection)
    for projections in by_weight.values():
        with weight_at(request.model, projections[0]).full() as weight:
            for projection in projections:
                rows = _rows(weight_at(request.model, projection).view(weight), projection)
                sums = (by_unit(squares, projection) for squares in (_inside(rows), rows.square().sum(1)))
                yield projection.name, *sums


def by_unit(elements: Tensor, projection: Projection) -> Tensor:
    """Return the sums over the elements of each unit, shape [count], on the CPU."""
    return elements.view(projection.count, projection.unit).sum(1).cpu()


def _rows(matrix: Tensor, projection: Projection) -> Tensor:
    """Return the weights of the projection's units, shape [count * unit, other side], float64."""
    elements = projection.elements(torch.arange(projection.count)).to(matrix.device)
    return matrix.movedim(projection.dim, 0)[elements].flatten(1).double()


def _inside(rows: Tensor) -> Tensor:
    """Return the sum of squares of each row in the best approximation of low rank, shape [rows]."""
    rank = max(1, min(rows.shape) // KEPT)
    if min(rows.shape) > EXACT:
        return _inside_randomized(rows, rank)
    if rows.shape[0] <= rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows @ rows.T)  # ascending
        return vectors[:, -rank:].square() @ values[-rank:].clamp(min=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    return (rows @ vectors[:, -rank:]).square().sum(1)


def _inside_randomized(rows: Tensor, rank: int) -> Tensor:
    """Approximate the same for a large weight, by twice as many random directions. The result is deterministic."""
    with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
        torch.manual_seed(0)
        left, values, _ = torch.svd_lowrank(rows, q=min(2 * rank, *rows.shape), niter=ROUNDS)
    return left[:, :rank].square() @ values[:rank].square()


METRIC = Metric(principal_scores, calibrated=False)
