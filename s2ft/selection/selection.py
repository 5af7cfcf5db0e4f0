"""The result of a selection: the trained units of each projection, in the base model's order."""

import hashlib
import json
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2ft.files.adapter_folder import own_folder, read_folder
from s2ft.files.reading import MAX_CONFIG, parse_json, read_bytes
from s2ft.files.replacing import replace_file
from s2ft.files.tables import by_key, table
from s2ft.model.coupling import PROJECTIONS

SCHEMA = 1


@dataclass(frozen=True)
class Selection:
    """Which units are trained, by projection. :func:`s2ft.select` makes it. It prints as a table.

    ``selection[name]`` returns the units of a projection, and ``name in selection`` tests for one.

    Attributes:
        units: Sorted unit numbers by projection name, shape [n], int64, in the base model's order.

    Example:
        >>> selection = s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02))
        >>> print(selection)
        projection  layers  units per layer  units
        down_proj        2                3      6
        >>> "model.layers.0.mlp.down_proj" in selection
        True
        >>> selection["model.layers.0.mlp.down_proj"].shape
        torch.Size([3])
    """

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
        """Return the unit numbers as lists, for JSON and for ``S2FTConfig(units=...)``.

        Returns:
            Lists of unit numbers by projection name, sorted by name.

        Example:
            >>> s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02, seed=1)).to_dict()
            {'model.layers.0.mlp.down_proj': [...], 'model.layers.1.mlp.down_proj': [...]}
        """
        return {path: units.tolist() for path, units in sorted(self.units.items())}

    @property
    def digest(self) -> str:
        """The sha256 of the selection. It is the same on all ranks and is saved in the adapter.

        Returns:
            64 hexadecimal digits.

        Example:
            >>> len(s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02)).digest)
            64
        """
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()

    def __str__(self) -> str:
        groups = by_key((_label(path), units.numel()) for path, units in self.units.items())
        head = ("projection", "layers", "units per layer", "units")
        rows = [(name, str(len(sizes)), span(sizes), f"{sum(sizes):,}") for name, sizes in groups.items()]
        return table([head, *rows], right={1, 2, 3})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the selection to a JSON file. An existing file is replaced in one step.

        Args:
            path: File to write.

        Example:
            >>> selection = s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.02))
            >>> selection.save("units.json")
            >>> s2ft.select(model, s2ft.S2FTConfig(units="units.json")) == selection
            True
        """
        content = {"schema": SCHEMA, "units": self.to_dict(), "digest": self.digest}
        replace_file(Path(path), json.dumps(content).encode())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Selection":
        """Read a selection from a file that :meth:`save` wrote, or from an adapter folder.

        Args:
            path: File, adapter folder, or output folder of a run.

        Returns:
            The selection.

        Raises:
            FileNotFoundError: The path does not exist.
            ValueError: The file does not contain a selection, or is damaged.

        Example:
            >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.02))
            >>> s2ft.save_adapter(model, "adapter")
            >>> s2ft.Selection.load("adapter")["model.layers.1.mlp.down_proj"].numel()
            3
        """
        path = Path(path)
        if path.is_dir():
            return read_folder(own_folder(path), _of_adapter)
        content = _read_object(path, "a selection")
        if content.keys() != {"schema", "units", "digest"}:
            raise ValueError(f"{path} is not a selection: it must have schema, units and digest, not {sorted(content)}")
        if content["schema"] != SCHEMA or isinstance(content["schema"], bool):
            raise ValueError(f"{path} has schema {content['schema']!r}; this s2ft reads schema {SCHEMA}")
        return _checked(path, content["units"], content["digest"])


def _label(name: str) -> str:
    """Return the part of a projection's name that all layers share: the last word, without the expert's number.

    If several projections share a weight, it is the last two words.
    """
    *_, before, last = ["", *re.sub(r"\[\d+\]", "", name).split(".")]
    return f"{before}.{last}" if last in PROJECTIONS and before else last


def span(sizes: list[int]) -> str:
    """Format a range of numbers, such as "3" or "3 to 5"."""
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def unit_tensors(units: Any, what: str) -> dict[str, Tensor]:
    """Read units from the value of an option.

    Args:
        units: Lists of unit numbers by projection name, or the path of a selection file or an adapter folder.
        what: Name of the option, for messages.

    Returns:
        Sorted unit numbers by projection name, shape [n], int64.

    Raises:
        ValueError: The units are not lists of different numbers from 0, or the file does not contain a selection.
    """
    return Selection.load(units).units if isinstance(units, str) else _tensors(units, what)


def _tensors(units: Any, what: str) -> dict[str, Tensor]:
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
    content = _read_object(path, "an adapter config")
    projections = content.get("projections")
    if not isinstance(projections, dict) or not all(isinstance(entry, dict) for entry in projections.values()):
        raise ValueError(f"{path} is not an S²FT adapter config: it has no projections")
    units = {key: entry.get("units") for key, entry in projections.items()}
    return _checked(path, units, content.get("selection_digest"))


def _read_object(path: Path, what: str) -> dict[str, Any]:
    content = parse_json(read_bytes(path, MAX_CONFIG), f"{path} is not {what}: it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not {what}: it contains a {type(content).__name__}, not an object")
    return content


def _checked(path: Path, units: Any, digest: Any) -> Selection:
    """Make the selection of a file, and check it against the digest in the file."""
    selection = Selection(_tensors(units, str(path)))
    if selection.digest != digest:
        raise ValueError(f"{path}: the units listed are not those that were saved, or not in order")
    return selection
