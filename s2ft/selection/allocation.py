"""Functions that the allocations share."""

from torch import Tensor

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Projection, unit_name


def best_first(scores: Tensor, smallest: bool) -> Tensor:
    """Return the units in the order of their scores, shape [n]. Units with the same score keep their order."""
    return scores.argsort(descending=not smallest, stable=True)


def check_enough(projections: list[Projection], requested: int, available: int, config: S2FTConfig) -> None:
    """Raise ValueError if fewer units are available than requested. The message names the options that take units."""
    if requested > available:
        takers = ["exclude"] if config.exclude is not None or config.protect_ratio is None else []
        takers += [] if config.protect_ratio is None else [f"protect_ratio={config.protect_ratio:g}"]
        where = projections[0].path if len(projections) == 1 else f"the layers' {projections[0].key} projections"
        raise ValueError(
            f"{' and '.join(takers)} leave{'s' * (len(takers) == 1)} {available} {unit_name(projections[0])} of "
            f"{where} to choose from; {requested} are requested"
        )
