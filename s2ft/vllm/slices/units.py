"""How many units a layer's bank holds, and whether the adapters that are known fit into it.

An engine puts any of its adapters into a batch, up to one for each slot. An adapter is therefore accepted only if it
fits together with the largest of the others. Otherwise a batch could fail in the middle of the engine's work.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

OPTION = "S2FT_VLLM_UNITS"
LEAST, SHARE = 256, 0.05  # of the default: units of a projection for each slot, and share of its extent
KINDS = ("outputs", "inputs")


@dataclass(frozen=True)
class Extent:
    """The units that a projection of a layer can have.

    Attributes:
        name: Last part of its path, such as "q_proj".
        size: Number of its outputs or inputs.
        local: Number of those on each rank.
    """

    name: str
    size: int
    local: int


@dataclass(frozen=True)
class Budget:
    """Units of each layer for the adapters of all slots together.

    Attributes:
        every: Units of every layer, None if the layers are named or for the default.
        named: Units by the name of a projection or of a fused layer, with ":inputs" or ":outputs" if it is not the dim
            that is usual for the layer.
    """

    every: int | None = None
    named: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read the option.

        Args:
            text: A number of units for every layer, or ``down_proj=512,o_proj=128``. Layers that are not named hold no
                slices then. Empty for the default.

        Raises:
            ValueError: The text has another form.

        Example:
            >>> from s2ft.vllm.slices.units import Budget
            >>> Budget.parse("down_proj=512, o_proj=128").named
            {'down_proj': 512, 'o_proj': 128}
        """
        text = text.strip()
        if not text:
            return cls()
        if text.isdigit():
            return cls(every=int(text))
        named = {}
        for word in text.split(","):
            name, _, number = (part.strip() for part in word.partition("="))
            kind = name.partition(":")[2]
            if not (name and number.isdigit()) or ":" in name and kind not in KINDS:
                raise ValueError(
                    f"{OPTION} has {word.strip()!r}: give a number of units for every layer, such as {OPTION}=512, or "
                    f"units by the name of a projection, such as {OPTION}=down_proj=512,o_proj=128"
                )
            named[name] = named.get(name, 0) + int(number)
        return cls(named=named)

    def units(self, layer: str, parts: Sequence[Extent], dim: int, usual: bool, slots: int, rank: int) -> int:
        """Return the units of one layer's bank.

        Args:
            layer: Last part of the layer's path in the engine, such as "qkv_proj".
            parts: The projections of the layer.
            dim: 0 for outputs, 1 for inputs.
            usual: Whether adapters of this layer usually have this dim.
            slots: Number of adapters at once.
            rank: The engine's largest rank of a LoRA.
        """
        most = slots * sum(part.local for part in parts)
        if self.every is not None:
            return min(most, self.every) if usual else 0
        if not self.named:
            each = [min(part.local, max(rank, LEAST, ceil(part.size * SHARE))) for part in parts]
            return slots * sum(each) if usual else 0
        names = dict.fromkeys((layer, *(part.name for part in parts)))
        keys = [key for name in names for key in ([name] if usual else []) + [f"{name}:{KINDS[dim]}"]]
        return min(most, sum(self.named.get(key, 0) for key in keys))


@dataclass(frozen=True)
class Place:
    """One bank of the engine's model.

    Attributes:
        path: Path of the layer.
        key: Name of the bank in the option, such as "down_proj".
        capacity: Units that fit into it.
    """

    path: str
    key: str
    capacity: int


class Admission:
    """The adapters that a batch may have, and whether one more fits."""

    def __init__(self, slots: int) -> None:
        """Start without adapters.

        Args:
            slots: Number of adapters at once.
        """
        self.slots = slots
        self._known: dict[int, dict[Place, int]] = {}

    def add(self, number: int, name: str, needs: Mapping[Place, int]) -> None:
        """Accept an adapter, or its new content.

        Args:
            number: The engine's number of the adapter.
            name: Its name, for the message.
            needs: Its units in each bank. Of several ranks, the most.

        Raises:
            ValueError: It does not fit together with the largest of the others. They stay as they are.
        """
        others = [units for known, units in self._known.items() if known != number]
        together = {
            place: sum(sorted([units, *(other.get(place, 0) for other in others)], reverse=True)[: self.slots])
            for place, units in needs.items()
        }
        missing = {place: units for place, units in together.items() if units > place.capacity}
        if missing:
            raise ValueError(self._message(name, needs, missing, [*others, needs]))
        self._known[number] = dict(needs)

    def forget(self, number: int) -> None:
        """Remove an adapter that no request can name any more."""
        self._known.pop(number, None)

    def _message(self, name: str, needs: Mapping, missing: Mapping[Place, int], every: list[Mapping]) -> str:
        place = max(missing, key=lambda place: missing[place] / max(1, place.capacity))
        return (
            f"the adapter {name!r} does not fit: it has {needs[place]} units in {place.path}, whose budget for all "
            f"adapters of a batch (--max-loras {self.slots}) is {place.capacity}, and together with the largest "
            f"others it needs {missing[place]}. Start vLLM with {OPTION}={setting(every, self.slots)}"
        )


def setting(adapters: Iterable[Mapping[Place, int]], slots: int) -> str:
    """Return the option's value with which any `slots` of these adapters fit.

    Args:
        adapters: The units of each adapter in each bank.
        slots: Number of adapters at once.
    """
    units: dict[Place, list[int]] = {}
    for adapter in adapters:
        for place, count in adapter.items():
            units.setdefault(place, []).append(count)
    most: dict[str, int] = {}
    for place, counts in units.items():
        most[place.key] = max(most.get(place.key, 0), sum(sorted(counts, reverse=True)[:slots]))
    return ",".join(f"{key}={count}" for key, count in sorted(most.items()) if count)
