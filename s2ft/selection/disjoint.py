"""Units that must not be chosen, and units chosen by hand."""

from typing import Union

import torch
from torch import Tensor

from s2ft.model.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.selection.selection import Selection, unit_tensors

Units = Union[dict[str, list[int]], str]  # by path, or the file or adapter folder that has them


def units_by_hand(couplings: list[Coupling], units: Units) -> Selection:
    """Raises: ValueError for a path, or a number, that the model doesn't have."""
    return Selection(_read(couplings, units, "units"))


def allowed_units(couplings: list[Coupling], requested: list[Projection], exclude: Units) -> dict[str, Tensor]:
    """By path of every requested projection, which units may be chosen [count] bool.

    Producers of a coupling that have the same units lose a unit together, so that their selections stay nested.
    Raises: as :func:`units_by_hand`.
    """
    excluded = {} if exclude is None else _read(couplings, exclude, "exclude")
    paths = {projection.name for projection in requested}
    allowed = {}
    for coupling in couplings:
        for projection in coupling.projections:
            if projection.name in paths:
                alike = (
                    [projection.name]
                    if projection.dim == 1
                    else [p.name for p in coupling.producers if p.count == projection.count and p.name in paths]
                )
                allowed[projection.name] = torch.ones(projection.count, dtype=torch.bool)
                for path in alike:
                    if path in excluded:
                        allowed[projection.name][excluded[path]] = False
    return allowed


def _read(couplings: list[Coupling], units: Units, option: str) -> dict[str, Tensor]:
    if isinstance(units, str):
        found = Selection.load(units).units
    else:
        found = unit_tensors(units, option)
    known = {projection.name: projection for projection in projections_of(couplings)}
    for path, numbers in found.items():
        if path not in known:
            raise ValueError(f"{option} names {path}, which is no projection of this model")
        if int(numbers.max()) >= known[path].count:
            raise ValueError(
                f"{option}: {path} has {known[path].count} {unit_name(known[path])}, from 0; there is no "
                f"{int(numbers.max())}"
            )
    return found
