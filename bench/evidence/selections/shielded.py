"""Units that the base needs least on protected data.

Source: Source-Shielded Updates (Yamaguchi et al., ACL 2026, arXiv 2512.04844), which scores weights as Wanda does, by
|weight| × norm of its input on source data, sums them over the columns, and freezes the half of the columns with the
largest sums. Here the units with the smallest scores are trained, instead of half of all columns. For an output or down
projection a unit is a group of columns, as there; for the others it is a group of rows, scored by its output.
"""

from bench.evidence.selections.request import ProtectedRequest, on_protected_data
from s2ft.selection.metric import Metric, Units
from s2ft.selection.product import product_scores


def shielded_scores(request: ProtectedRequest) -> Units:
    """Return weight norm × activation norm of each unit on the protected data. The smallest are meant to be chosen.

    Returns:
        The scores by projection, shape [count], float64.
    """
    return product_scores(on_protected_data(request))


METRIC = Metric(shielded_scores, calibrated=False)
