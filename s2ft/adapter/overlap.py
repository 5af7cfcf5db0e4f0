"""What adapters have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2ft.adapter.adapter import Adapter


@dataclass(frozen=True)
class Overlap:
    """What adapters share: by projection, units that two or more of them train, of all units that any trains."""

    shared: dict[str, int]
    trained: dict[str, int]

    @property
    def units(self) -> int:
        return sum(self.shared.values())

    @property
    def share(self) -> float:
        """Of all trained units, 0 to 1."""
        return self.units / max(1, sum(self.trained.values()))

    def __str__(self) -> str:
        if not self.units:
            return f"the adapters are disjoint: none of {sum(self.trained.values()):,} units is trained by two"
        width = max(map(len, self.shared))
        lines = [
            f"{path:<{width}}{count:>8,} of {self.trained[path]:,}" for path, count in self.shared.items() if count
        ]
        return "\n".join(
            [*lines, f"{self.units:,} of {sum(self.trained.values()):,} trained units are shared ({self.share:.1%})"]
        )


def overlap(adapters: Sequence[Adapter]) -> Overlap:
    """Units that two or more of `adapters` train."""
    shared, trained = {}, {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.deltas):
        units = torch.cat([adapter.selection[path] for adapter in adapters if path in adapter.deltas])
        _, counts = units.unique(return_counts=True)
        shared[path], trained[path] = int((counts > 1).sum()), counts.numel()
    return Overlap(shared, trained)
