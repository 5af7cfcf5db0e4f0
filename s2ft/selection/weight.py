"""Selection by weight norm (S²FT-W in the paper)."""

from s2ft.model.weights import weight_at
from s2ft.selection.metric import Metric, Request, Units, squares_by_unit


def weight_scores(request: Request) -> Units:
    """Return the L2 norm of each unit's weights: its rows in a producer's weight, its columns in the consumer's.

    Biases do not count.
    """
    scores = {}
    for projection in request.projections:
        matrix = weight_at(request.model, projection).matrix
        scores[projection.name] = squares_by_unit(matrix, projection.dim, projection).sqrt().cpu()
    return scores


METRIC = Metric(weight_scores, calibrated=False)
