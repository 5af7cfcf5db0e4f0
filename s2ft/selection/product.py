"""Selection by weight norm times activation norm (S²FT-S in the paper)."""

from s2ft.selection.activation import activation_scores
from s2ft.selection.metric import Metric, Request, Units
from s2ft.selection.weight import weight_scores


def product_scores(request: Request) -> Units:
    """Return the product of each unit's weight norm and activation norm in the same projection."""
    activations = activation_scores(request)
    return {path: weights * activations[path] for path, weights in weight_scores(request).items()}


METRIC = Metric(product_scores, calibrated=True)
