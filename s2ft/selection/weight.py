"""Selection by weight norm (S²FT-W in the paper)."""

from s2ft.model.coupling import Projection
from s2ft.model.weights import weight_at
from s2ft.selection.metric import Metric, Request, Units, squares_by_unit


def weight_scores(request: Request) -> Units:
    """Return the L2 norm of each unit's weights: its rows in a producer's weight, its columns in the consumer's.

    Biases do not count. Weights that are spread over ranks are gathered, one at a time.
    """
    by_weight: dict[str, list[Projection]] = {}
    for projection in request.projections:
        by_weight.setdefault(projection.path, []).append(projection)
    scores = {}
    for projections in by_weight.values():
        with weight_at(request.model, projections[0]).full() as weight:
            for projection in projections:
                matrix = weight_at(request.model, projection).view(weight)
                scores[projection.name] = squares_by_unit(matrix, projection.dim, projection).sqrt().cpu()
    return {projection.name: scores[projection.name] for projection in request.projections}


METRIC = Metric(weight_scores, calibrated=False)
