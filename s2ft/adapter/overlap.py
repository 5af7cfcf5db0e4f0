"""The units that several adapters train."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2ft.adapter.adapter import Adapter
from s2ft.files.tables import table


@dataclass(frozen=True)
class Overlap:
    """The units that two or more adapters train. Printed, it is a table by projection.

    Attributes:
        shared: Number of units that two or more adapters train, by projection.
        trained: Number of units that at least one adapter trains, by projection.
    """

    shared: dict[str, int]
    trained: dict[str, int]

    @property
    def units(self) -> int:
        """Number of shared units of all projections."""
        return sum(self.shared.values())

    @property
    def share(self) -> float:
        """Shared units divided by trained units, 0 to 1."""
        return self.units / max(1, sum(self.trained.values()))

    def __str__(self) -> str:
        if not self.units:
            return f"the adapters are disjoint: none of {sum(self.trained.values()):,} units is trained by two"
        rows = [(path, f"{count:,}", f"of {self.trained[path]:,}") for path, count in self.shared.items() if count]
        total = f"{self.units:,} of {sum(self.trained.values()):,} trained units are shared ({self.share:.1%})"
        return f"{table(rows, right={1})}\n{total}"


def overlap(adapters: Sequence[Adapter]) -> Overlap:
    """Count the units that two or more adapters train.

    Args:
        adapters: The adapters, of one base.

    Returns:
        The counts by projection.

    Example:
        >>> config = s2ft.S2FTConfig(d_ratio=0.1)
        >>> report = s2ft.attach(model, config, name="math")
        >>> adapter = s2ft.get_adapter(model, "math")
        >>> s2ft.adapter.overlap([adapter, adapter]).share
        1.0
    """
    shared, trained = {}, {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.deltas):
        units = torch.cat([adapter.selection[path] for adapter in adapters if path in adapter.deltas])
        _, counts = units.unique(return_counts=True)
        shared[path], trained[path] = int((counts > 1).sum()), counts.numel()
    return Overlap(shared, trained)
