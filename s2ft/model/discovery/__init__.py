"""Finds the couplings of a model of no known family."""

from s2ft.model.discovery.search import STATUSES, Discovery, WeightRow, discover

__all__ = ["STATUSES", "Discovery", "WeightRow", "discover"]
