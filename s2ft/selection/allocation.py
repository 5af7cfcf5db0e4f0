"""From scores to units: the best of every projection, or the best over all layers."""
from typing import Dict, List

import torch
from torch import Tensor

from s2ft.config import S2FTConfig
from s2ft.coupling import Projection, unit_name
from s2ft.selection.metric import Request


def best_first(scores: Tensor, smallest: bool) -> Tensor:
    """Units by score [n]; of equal ones the lower number comes first."""
    return scores.argsort(descending=not smallest, stable=True)


def allocate(request: Request, scores: Dict[str, Tensor], budget: Dict[str, int], smallest: bool) -> Dict[str, Tensor]:
    """Sorted units by path, as many of every projection as `budget` says."""
    return {path: best_first(scores[path], smallest)[:units].sort().values for path, units in budget.items()}
