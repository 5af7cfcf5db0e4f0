"""Selection by weight times activation (paper, S²FT-S)."""

from torch import Tensor

from s2ft.selection.activation import activation_scores
from s2ft.selection.metric import Request
from s2ft.selection.weight import weight_scores


def product_scores(request: Request) -> dict[str, Tensor]:
    """A unit's weight norm times its activation norm, both in the same projection."""
    activations = activation_scores(request)
    return {path: weights * activations[path] for path, weights in weight_scores(request).items()}
