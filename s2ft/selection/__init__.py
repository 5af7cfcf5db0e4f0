"""Which units are trained: one file a metric, plus the budget and the result."""
from typing import Callable, Dict, List

from torch import Tensor

from s2ft.config import S2FTConfig
from s2ft.coupling import Coupling
from s2ft.selection.budget import units_per_projection
from s2ft.selection.random import random_rankings
from s2ft.selection.selection import Selection

# metric → rankings(couplings, config): for every projection's path its units [count], best first
METRICS: Dict[str, Callable[[List[Coupling], S2FTConfig], Dict[str, Tensor]]] = {"random": random_rankings}

__all__ = ["METRICS", "Selection", "select"]


def select(couplings: List[Coupling], config: S2FTConfig) -> Selection:
    """The units that `config` asks for, by projection, in original order.

    A function of the couplings and the config alone: the same on every rank and for every layout.
    Raises: ValueError when nothing is asked for, a ratio selects no unit, or a projection or layer
    that is asked for does not exist.
    """
    budget = units_per_projection(couplings, config)
    rankings = METRICS[config.selection](couplings, config)
    return Selection({path: rankings[path][:units].sort().values for path, units in budget.items()})
