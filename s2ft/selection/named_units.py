"""Units that the config names: the units to train, and the units to exclude."""

import torch
from torch import Tensor

from s2ft.model.coupling import Coupling, Projection, projections_of, unit_name
from s2ft.selection.selection import Selection, unit_tensors


def named_units(couplings: list[Coupling], units: dict[str, list[int]] | str) -> Selection:
    """Return the selection that the config's `units` name.

    Raises:
        ValueError: A projection or a unit does not exist in the model.
    """
    return Selection(_read(couplings, units, "units"))


def allowed_units(
    couplings: list[Coupling], requested: list[Projection], exclude: dict[str, list[int]] | str | None
) -> dict[str, Tensor]:
    """Return which units may be chosen, as a mask of shape [count] by name of the requested projections.

    If a unit is excluded from one producer of a coupling, it is excluded from all producers with the same units, so
    that their selections stay nested.

    Raises:
        ValueError: A projection or a unit in `exclude` does not exist in the model.
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


def _read(couplings: list[Coupling], units: dict[str, list[int]] | str, option: str) -> dict[str, Tensor]:
    found = unit_tensors(units, option)
    known = {projection.name: projection for projection in projections_of(couplings)}
    for path, numbers in found.items():
        if path not in known:
            raise ValueError(f"{option} names {path}, which is not a projection of this model")
        if int(numbers.max()) >= known[path].count:
            raise ValueError(
                f"{option}: {path} has {known[path].count} {unit_name(known[path])}, from 0; there is no "
                f"{int(numbers.max())}"
            )
    return found
