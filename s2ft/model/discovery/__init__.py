"""Finds the couplings of a model of no known family.

Couplings are proposed from the names and sizes of the model's layers, and tried on a tiny twin in float64. What the
trials confirm can move; what they don't is trained in place, or one layer by itself.
"""

from s2ft.model.discovery.report import Discovery, WeightRow
from s2ft.model.discovery.search import discover

__all__ = ["Discovery", "WeightRow", "discover"]
