"""Model families: which function lists the couplings of which model type."""

from s2ft.model.families import composite
from s2ft.model.families.composite import FAMILIES, SINCE, check_release, is_too_old

__all__ = ["FAMILIES", "SINCE", "check_release", "composite", "is_too_old"]
