"""The result of selecting: which units of which projection are trainable, in original order."""
import hashlib
import json
from dataclasses import dataclass
from typing import Dict, List

import torch
from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """units: module path → sorted unit numbers [n] int64 in the base model's own order."""

    units: Dict[str, Tensor]

    def __getitem__(self, path: str) -> Tensor:
        return self.units[path]

    def __contains__(self, path: str) -> bool:
        return path in self.units

    def __eq__(self, other) -> bool:
        return (isinstance(other, Selection) and self.units.keys() == other.units.keys()
                and all(torch.equal(units, other.units[path]) for path, units in self.units.items()))

    def to_dict(self) -> Dict[str, List[int]]:
        return {path: units.tolist() for path, units in sorted(self.units.items())}

    @property
    def digest(self) -> str:
        """sha256 of the selection: equal on all ranks, kept in the adapter."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()
