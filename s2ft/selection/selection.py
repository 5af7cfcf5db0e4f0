"""The result of selecting: which units of which projection are trainable, in original order."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2ft.files.adapter_folder import read_folder
from s2ft.files.reading import MAX_CONFIG, parse_json, read_bytes
from s2ft.files.writing import replace_file
from s2ft.model.coupling import PROJECTIONS

SCHEMA = 1


@dataclass(frozen=True)
class Selection:
    """units: module path → sorted unit numbers [n] int64 in the base model's own order. Prints as a table."""

    units: dict[str, Tensor]

    def __getitem__(self, path: str) -> Tensor:
        return self.units[path]

    def __contains__(self, path: str) -> bool:
        return path in self.units

    def __eq__(self, other) -> bool:
        return (
            isinstance(other, Selection)
            and self.units.keys() == other.units.keys()
            and all(torch.equal(units, other.units[path]) for path, units in self.units.items())
        )

    def to_dict(self) -> dict[str, list[int]]:
        return {path: units.tolist() for path, units in sorted(self.units.items())}

    @property
    def digest(self) -> str:
        """sha256 of the selection: equal on all ranks, kept in the adapter."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for path, units in self.units.items():
            groups.setdefault(_label(path), []).append(units.numel())
        lines = [f"{'projection':<12}{'layers':>7}{'units a layer':>16}{'units':>10}"]
        return "\n".join(
            lines + [f"{name:<12}{len(sizes):>7}{span(sizes):>16}{sum(sizes):>10,}" for name, sizes in groups.items()]
        )

    def save(self, path) -> None:
        """Write as JSON, beside and renamed."""
        content = {"schema": SCHEMA, "units": self.to_dict(), "digest": self.digest}
        replace_file(Path(path), json.dumps(content).encode())

    @classmethod
    def load(cls, path) -> "Selection":
        """Read what :meth:`save` wrote, or the selection of an adapter folder.

        Raises: FileNotFoundError; ValueError for a file that holds anything else, saying what.
        """
        path = Path(path)
        if path.is_dir():
            return read_folder(path, _of_adapter)
        content = _read_object(path, "selection")
        if content.keys() != {"schema", "units", "digest"}:
            raise ValueError(f"{path} is no selection: it must have schema, units and digest, not {sorted(content)}")
        if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
            raise ValueError(f"{path} has schema {content['schema']!r}; this s2ft reads schema {SCHEMA}")
        return _checked(path, content["units"], content["digest"])


def _label(name: str) -> str:
    """What names of a projection in all layers have in common: their last word without the expert's number, two
    words where several projections share a weight."""
    *_, before, last = ["", *re.sub(r"\[\d+\]", "", name).split(".")]
    return f"{before}.{last}" if last in PROJECTIONS and before else last


def span(sizes: list[int]) -> str:
    """ "3" or "3 to 5"."""
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def unit_tensors(units: Any, what: str) -> dict[str, Tensor]:
    """Sorted unit numbers by path, from lists. Raises: ValueError, naming `what` and the path, for anything that
    is not a list of different numbers from 0."""
    if not isinstance(units, dict) or not units or not all(isinstance(path, str) for path in units):
        raise ValueError(f"{what} must give lists of unit numbers by module path, and at least one")
    tensors = {}
    for path, numbers in units.items():
        numbers = numbers.tolist() if isinstance(numbers, Tensor) else numbers
        if (
            not isinstance(numbers, (list, tuple))
            or not numbers
            or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < 2**63 for n in numbers)
        ):
            raise ValueError(f"{what}: {path} must have a list of unit numbers from 0, and at least one")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{what}: {path} names a unit twice")
        tensors[path] = torch.tensor(sorted(numbers), dtype=torch.int64)
    return tensors


def _of_adapter(path: Path) -> Selection:
    content = _read_object(path, "adapter config")
    projections = content.get("projections")
    if not isinstance(projections, dict) or not all(isinstance(entry, dict) for entry in projections.values()):
        raise ValueError(f"{path} is no S²FT adapter config: it names no projections")
    units = {key: entry.get("units") for key, entry in projections.items()}
    return _checked(path, units, content.get("selection_digest"))


def _read_object(path: Path, what: str) -> dict[str, Any]:
    content = parse_json(read_bytes(path, MAX_CONFIG), f"{path} is no {what}: it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no {what}: it holds a {type(content).__name__}, not an object")
    return content


def _checked(path: Path, units: Any, digest: Any) -> Selection:
    selection = Selection(unit_tensors(units, str(path)))
    if selection.digest != digest:
        raise ValueError(f"{path}: the units listed are not those that were saved, or not in order")
    return selection
