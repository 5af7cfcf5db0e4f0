"""Units with a large gradient on the task for their gradient on protected data.

Source: the empirical Fisher information as a measure of what a model needs (Kirkpatrick et al., "Overcoming
catastrophic forgetting", arXiv 1612.00796): to second order, an update of fixed size costs the protected data their
Fisher information of the unit, and its gain on the task grows with the task's gradient. The ratio by unit is ours.
"""

from bench.evidence.selections.request import ProtectedRequest, on_protected_data, ratio
from s2ft.selection.gradient import gradient_scores
from s2ft.selection.metric import Metric, Units


def fisher_ratio_scores(request: ProtectedRequest) -> Units:
    """Return the gradient norm on the task / (that on the protected data + its mean), see `gradient`.

    The square of a gradient norm over single sequences is the trace of the empirical Fisher information of the unit.

    Returns:
        The ratios by projection, shape [count], float64.
    """
    return ratio(gradient_scores(request), gradient_scores(on_protected_data(request)))


METRIC = Metric(fisher_ratio_scores, calibrated=True)
