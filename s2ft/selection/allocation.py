"""Functions that the allocations share."""

from torch import Tensor

from s2ft.model.coupling import Projection, unit_name


def best_first(scores: Tensor, smallest: bool) -> Tensor:
    """Return the units in the order of their scores, shape [n]. Units with the same score keep their order."""
    return scores.argsort(descending=not smallest, stable=True)


def check_enough(projections: list[Projection], requested: int, available: int) -> None:
    """Raise ValueError if fewer units are available than requested."""
    if requested > available:
        where = projections[0].path if len(projections) == 1 else f"the layers' {projections[0].key} projections"
        raise ValueError(
            f"exclude leaves {available} {unit_name(projections[0])} of {where} to choose from; "
            f"{requested} are requested"
        )
