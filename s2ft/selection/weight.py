"""Selection by weight norm (paper, S²FT-W)."""

from torch import Tensor

from s2ft.model.weights import weight_at
from s2ft.selection.metric import Request, squares_by_unit


def weight_scores(request: Request) -> dict[str, Tensor]:
    """The L2 norm of a unit's weights in the projection, over all elements that it spans: of its rows in a
    producer's weight, of its columns in the consumer's. Biases don't count."""
    scores = {}
    for projection in request.projections:
        matrix = weight_at(request.model, projection).matrix
        scores[projection.name] = squares_by_unit(matrix, projection.dim, projection).sqrt().cpu()
    return scores
