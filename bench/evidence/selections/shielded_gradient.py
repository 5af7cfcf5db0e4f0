"""Units with a large gradient × weight on the task for what the base needs them on protected data.

Source: our own ratio of two published scores, gradient × weight (Molchanov et al., arXiv 1906.10771) on the task and
Wanda's weight × activation on source data (arXiv 2512.04844). It asks what S²FT's first results asked: to learn where
the base loses least.
"""

from bench.evidence.selections.request import ProtectedRequest, on_protected_data, ratio
from bench.evidence.selections.saliency import saliency_scores
from s2ft.selection.metric import Metric, Units
from s2ft.selection.product import product_scores


def shielded_gradient_scores(request: ProtectedRequest) -> Units:
    """Return saliency on the task / (need of the protected data + its mean), see `saliency` and `shielded`.

    Returns:
        The ratios by projection, shape [count], float64.
    """
    return ratio(saliency_scores(request), product_scores(on_protected_data(request)))


METRIC = Metric(shielded_gradient_scores, calibrated=True)
