"""Checks of couplings that a user describes. The registry checks them against the model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from s2ft.config import check_whole
from s2ft.files.tables import by_key
from s2ft.model.coupling import PROJECTIONS, Coupling, Projection, Vector, projections_of

OPTIONAL = ("stride", "size", "expert")  # fields that may be None


def checked_couplings(couplings: Sequence[Coupling]) -> list[Coupling]:
    """Check couplings by themselves, without the model.

    Args:
        couplings: List or tuple of couplings.

    Returns:
        The couplings as a list, with tuples where the user gave lists.

    Raises:
        TypeError: Something is of the wrong type; the message names the coupling.
        ValueError: A field has no valid value, or couplings overlap; the message names the coupling or the weight.
    """
    if not isinstance(couplings, (list, tuple)) or not couplings:
        raise TypeError(f"couplings must be a list of at least one s2ft.Coupling, got {couplings!r}")
    couplings = [_checked(coupling, f"couplings[{i}]") for i, coupling in enumerate(couplings)]
    _check_apart(couplings)
    return couplings


def _check_apart(couplings: list[Coupling]) -> None:
    """Check that a weight has its units on one side, each element in one unit, and that names differ."""
    names = Counter(projection.name for projection in projections_of(couplings))
    twice = next((name for name, count in names.items() if count > 1), None)
    if twice is not None:
        raise ValueError(
            f"couplings must have each projection once, and {twice} is there twice: a module is trained on one side "
            "only, so it can be in one coupling"
        )
    by_weight = by_key((projection.weight_key, projection) for projection in projections_of(couplings))
    for (path, _), projections in by_weight.items():
        if len({(projection.dim, projection.size, projection.transposed) for projection in projections}) > 1:
            raise ValueError(
                f"projections that share a weight must have the same dim, size and transposed: those of {path} differ"
            )
        elements = torch.cat([projection.elements(torch.arange(projection.count)) for projection in projections])
        if elements.unique().numel() < elements.numel():
            raise ValueError(
                f"couplings must have each element of a weight in one unit, and an element of {path} is in two: are "
                "start, stride, unit or size wrong?"
            )


def _checked(coupling: Any, where: str) -> Coupling:
    if not isinstance(coupling, Coupling):
        raise TypeError(f"{where} must be an s2ft.Coupling, got {type(coupling).__name__}")
    if coupling.block is not None or coupling.activation is not None:
        raise ValueError(f"{where}: block and activation must be None, except in the model families of s2ft")
    if not isinstance(coupling.kind, str) or not isinstance(coupling.fixed, bool):
        raise TypeError(f"{where}: kind must be a str and fixed a bool, got {coupling.kind!r} and {coupling.fixed!r}")
    _check_numbers(coupling, where, "", layer=0)
    coupling = replace(coupling, producers=tuple(coupling.producers), vectors=tuple(coupling.vectors))
    if coupling.is_one_sided and len(list(coupling.projections)) != 1:
        raise ValueError(
            f"{where}: a coupling must have producers and a consumer, or, if its layer shares units with no other, "
            f"exactly one projection; got {len(coupling.producers)} producers and no consumer"
        )
    if coupling.is_one_sided and coupling.vectors:
        raise ValueError(
            f"{where}: vectors are reordered with the units, and nothing of a one-sided coupling is: leave them out"
        )
    for projection in coupling.projections:
        _check_projection(projection, int(projection is coupling.consumer), where, coupling.is_one_sided)
    for vector in coupling.vectors:
        if not isinstance(vector, Vector) or not isinstance(vector.path, str):
            raise TypeError(f"{where}: vectors must be Vector of s2ft.model.coupling, got {vector!r}")
        _check_numbers(vector, where, f" of {vector.path}", unit=1, expert=0, start=0, size=1)
    return coupling


def _check_projection(projection: Any, dim: int, where: str, is_one_sided: bool) -> None:
    if not isinstance(projection, Projection) or not isinstance(projection.path, str):
        raise TypeError(
            f"{where}: producers and consumer must be Projection of s2ft.model.coupling, got {projection!r}"
        )
    keys = "l" if is_one_sided else ("qkvug", "od")[dim]
    if projection.key not in PROJECTIONS or projection.key not in keys:
        place = "in a one-sided coupling" if is_one_sided else "on this side"
        raise ValueError(
            f"{where}: the key of {projection.path} must be one of {', '.join(keys)} {place}, got {projection.key!r}"
        )
    if projection.dim != dim:
        raise ValueError(
            f"{where}: {projection.path} must have dim {dim} ({('producer', 'consumer')[dim]}), got {projection.dim!r}"
        )
    _check_numbers(projection, where, f" of {projection.path}", count=1, unit=1, start=0, stride=1, size=1, expert=0)
    if not isinstance(projection.transposed, bool) or projection.transposed and projection.expert is None:
        raise ValueError(
            f"{where}: transposed of {projection.path} must be a bool, and can be True for an expert only, got "
            f"{projection.transposed!r}"
        )
    if projection.size is None and (projection.start or projection.stride is not None):
        raise ValueError(
            f"{where}: {projection.path} must have size, the number of all elements of dim {dim}, with start or stride"
        )
    last = int(projection.elements(torch.tensor([projection.count - 1])).max())
    if last >= projection.extent:
        raise ValueError(
            f"{where}: the last unit of {projection.path} must end within size {projection.size}, and it ends at "
            f"element {last}"
        )


def _check_numbers(thing: Any, where: str, of: str, **least: int) -> None:
    """Raise ValueError unless each of these fields is a whole number of at least so much, or None if it may be."""
    for name, lowest in least.items():
        if getattr(thing, name) is not None or name not in OPTIONAL:
            check_whole(f"{where}: {name}{of}", getattr(thing, name), lowest)
