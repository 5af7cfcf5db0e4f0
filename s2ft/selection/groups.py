"""Units chosen in groups of neighbouring inputs, for a base whose weights are packed in blocks of inputs.

A group is chosen as one unit of a coarser projection, so that every metric scores it and every budget counts it.
"""

from dataclasses import replace

import torch

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling, Projection, unit_name
from s2ft.selection.selection import Selection, unit_tensors


class Groups:
    """Couplings whose consumers have groups of inputs as their units, and the way back to their own units."""

    def __init__(self, couplings: list[Coupling], config: S2FTConfig) -> None:
        """Make groups of `config.group` inputs of every projection that the config requests.

        Raises:
            ValueError: The inputs of a projection can't be split into groups of whole units, or units into groups.
        """
        self.sizes: dict[str, int] = {}  # units of a group, by projection
        self.couplings = [
            replace(coupling, consumer=self._grouped(coupling.consumer, config.group))
            if coupling.consumer is not None and coupling.consumer.key in config.ratios
            else coupling
            for coupling in couplings
        ]
        exclude = config.exclude
        if exclude is not None:
            exclude = {
                path: (units // self.sizes.get(path, 1)).unique().tolist()
                for path, units in unit_tensors(exclude, "exclude").items()
            }
        self.config = replace(config, group=None, exclude=exclude)

    def _grouped(self, projection: Projection, group: int) -> Projection:
        if projection.unit % group == 0:  # a head of whole groups
            return projection
        inputs = projection.count * projection.unit
        if group % projection.unit or inputs % group:
            raise ValueError(
                f"group={group}: {projection.name} has {projection.count} {unit_name(projection)}"
                + (f" of {projection.unit} inputs" if projection.unit > 1 else "")
                + f", which are no whole groups of {group} inputs: leave out {projection.key}_ratio, or group"
            )
        self.sizes[projection.name] = group // projection.unit
        return replace(projection, count=inputs // group, unit=group)

    def units_of(self, chosen: Selection) -> Selection:
        """The units of the chosen groups."""
        found = {}
        for path, units in chosen.units.items():
            size = self.sizes.get(path, 1)
            found[path] = (units[:, None] * size + torch.arange(size)).flatten()
        return Selection(found)
