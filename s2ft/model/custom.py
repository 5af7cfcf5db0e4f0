"""Couplings given by hand, checked by themselves; the registry checks them against the model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from s2ft.model.coupling import PROJECTIONS, Coupling, Projection, Vector, projections_of


def checked_couplings(couplings: Sequence[Coupling]) -> list[Coupling]:
    """`couplings` as a list. Raises: TypeError or ValueError for what can't be meant, naming the coupling."""
    if not isinstance(couplings, (list, tuple)) or not couplings:
        raise TypeError(f"couplings must be a list of at least one s2ft.Coupling, got {couplings!r}")
    couplings = [_checked(coupling, f"couplings[{i}]") for i, coupling in enumerate(couplings)]
    _check_apart(couplings)
    return couplings


def _check_apart(couplings: list[Coupling]) -> None:
    """A weight has its units on one side, and no element in two projections; names are different."""
    names, by_weight = set(), {}
    for projection in projections_of(couplings):
        if projection.name in names:
            raise ValueError(
                f"couplings name {projection.name} twice: a module can be trained on one side only, so "
                "it can be in one coupling"
            )
        names.add(projection.name)
        by_weight.setdefault(projection.weight_key, []).append(projection)
    for (path, _), projections in by_weight.items():
        if len({(projection.dim, projection.size) for projection in projections}) > 1:
            raise ValueError(
                f"couplings take {path} on two sides, or with and without size: projections that share a "
                "weight must have the same dim and size"
            )
        elements = torch.cat([projection.elements(torch.arange(projection.count)) for projection in projections])
        if elements.unique().numel() < elements.numel():
            raise ValueError(
                f"couplings have an element of {path} in two units: are start, stride, unit or size wrong?"
            )


def _checked(coupling: Any, where: str) -> Coupling:
    if not isinstance(coupling, Coupling):
        raise TypeError(f"{where} must be an s2ft.Coupling, got {type(coupling).__name__}")
    if coupling.block is not None or coupling.activation is not None:
        raise ValueError(f"{where}: block and activation are for the model families that s2ft knows")
    if not isinstance(coupling.kind, str) or not isinstance(coupling.fixed, bool):
        raise TypeError(f"{where}: kind must be a word and fixed True or False")
    _check_number(coupling.layer, 0, f"{where}: layer")
    coupling = replace(coupling, producers=tuple(coupling.producers), vectors=tuple(coupling.vectors))
    if not coupling.producers:
        raise ValueError(f"{where} has no producers")
    for projection in coupling.producers:
        _check_projection(projection, 0, where)
    _check_projection(coupling.consumer, 1, where)
    for vector in coupling.vectors:
        if not isinstance(vector, Vector) or not isinstance(vector.path, str):
            raise TypeError(f"{where}: vectors must be Vector of s2ft.model.coupling, got {vector!r}")
        _check_number(vector.unit, 1, f"{where}: unit of {vector.path}")
    return coupling


def _check_projection(projection: Any, dim: int, where: str) -> None:
    if not isinstance(projection, Projection) or not isinstance(projection.path, str):
        raise TypeError(
            f"{where}: producers and consumer must be Projection of s2ft.model.coupling, got {projection!r}"
        )
    if projection.key not in PROJECTIONS or (projection.key in "od") != (dim == 1):
        raise ValueError(
            f"{where}: the key of {projection.path} must be one of "
            f"{', '.join(('qkvug', 'od')[dim])} on this side, got {projection.key!r}"
        )
    if projection.dim != dim:
        raise ValueError(
            f"{where}: {projection.path} must have dim {dim} ({('producer', 'consumer')[dim]}), got {projection.dim!r}"
        )
    for name, least in (("count", 1), ("unit", 1), ("start", 0), ("stride", 1), ("size", 1), ("expert", 0)):
        value = getattr(projection, name)
        if value is not None or name in ("count", "unit", "start"):
            _check_number(value, least, f"{where}: {name} of {projection.path}")
    if projection.size is None and (projection.start or projection.stride is not None):
        raise ValueError(f"{where}: {projection.path} has start or stride, which need size: all elements of dim {dim}")
    last = int(projection.elements(torch.tensor([projection.count - 1])).max())
    if last >= projection.extent:
        raise ValueError(
            f"{where}: the last unit of {projection.path} ends at element {last}, outside size {projection.size}"
        )


def _check_number(value: Any, least: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}")
