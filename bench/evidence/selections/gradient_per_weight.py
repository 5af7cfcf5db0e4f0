"""Units with large gradients and small weights.

Source: GaLLoP (Choudhary et al., arXiv 2510.19778), which trains the entries with the largest gradients on the task and
the smallest weights. It scores single entries. The ratio of the norms of a unit is ours.
"""

from bench.evidence.selections.request import ratio
from s2ft.selection.gradient import gradient_scores
from s2ft.selection.metric import Metric, Request, Units
from s2ft.selection.weight import weight_scores


def gradient_per_weight_scores(request: Request) -> Units:
    """Return gradient norm / weight norm of each unit, see `gradient` and `weight`.

    Returns:
        The ratios by projection, shape [count], float64. They are 0 for a unit without weights whose gradient is 0.
    """
    return ratio(gradient_scores(request), weight_scores(request), damping=1e-9)


METRIC = Metric(gradient_per_weight_scores, calibrated=True)
