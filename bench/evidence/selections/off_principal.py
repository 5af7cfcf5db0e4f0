"""Units that lie outside the principal subspace of their weight.

Source: GeoRA (Zhang et al., ACL 2026, arXiv 2601.09361) and "The Path Not Taken" (arXiv 2511.08567): reinforcement
learning changes weights outside the principal subspace, and training inside it can fail. Both mask single entries; the
share of a unit is ours. For the units with the smallest principal norms, take `principal` with order "smallest".
"""

from bench.evidence.selections.principal import squares_inside_and_all
from s2ft.selection.metric import Metric, Request, Units


def off_principal_scores(request: Request) -> Units:
    """Return the share of each unit's squared norm that a low-rank approximation of its projection lacks, 0 to 1.

    The approximation is that of `principal`. The share of a unit without weights is 1.

    Returns:
        The shares by projection, shape [count], float64.
    """
    return {
        name: (1 - inside / all_).clamp(0, 1).where(all_ > 0, 1.0)
        for name, inside, all_ in squares_inside_and_all(request)
    }


METRIC = Metric(off_principal_scores, calibrated=False)
