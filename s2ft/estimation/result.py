"""The result of an estimate, and its table."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from s2ft.files.tables import table


@dataclass(frozen=True)
class MemoryPart:
    """The memory of a layer or another part of the model, in bytes except for `trained`.

    Attributes:
        name: Name of the part.
        parameters: Frozen weights and deltas. A tied weight counts in the first part that has it.
        buffers: Buffers.
        trained: Number of trained parameters, not bytes.
        gradients: Gradients.
        optimizer: State of the optimizer.
        kept: Tensors that autograd saves in the forward for the backward.
    """

    name: str
    parameters: int
    buffers: int
    trained: int
    gradients: int
    optimizer: int
    kept: int


@dataclass(frozen=True)
class Estimate:
    """The memory of training, in bytes. :func:`s2ft.estimate` makes it. It prints as a table.

    The table has a line per part. Consecutive layers with the same numbers share a line.

    Attributes:
        parts: Memory of the model's parts, in the model's order.
        batch: Number of sequences, images or recordings in one forward.
        length: Number of tokens of each, or None if the inputs are not tokens.
        device: Device of the training.
        peak: Largest memory in use at one time during a step.
        peak_in: Phase of the peak: "forward", "backward" or "optimizer".
        resident: Part of the peak that is on the device already: the weights of a loaded model.
        free: Free memory of the device, or None if it is not known.
        notes: Assumptions of the numbers.
        strategy: How the training is spread over devices, or None for one device. With a strategy the numbers are those
            of one device.
        devices: Number of devices.
        host: Memory of the host that one device uses for what is offloaded.
        communication: Part of the peak that is held for communication during the whole step: DDP's buckets, ZeRO's
            reduction buffers.

    Example:
        >>> estimate = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8)
        >>> estimate.peak_in, estimate.parts[1].name, estimate.parts[1].trained
        ('backward', 'model.layers.0', 832)
    """

    parts: list[MemoryPart]
    batch: int
    length: int | None
    device: str
    peak: int
    peak_in: str
    resident: int
    free: int | None
    notes: tuple[str, ...]
    strategy: str | None = None
    devices: int = 1
    host: int = 0
    communication: int = 0

    @property
    def parameters(self) -> int:
        """Bytes of all parameters: frozen weights and deltas."""
        return sum(part.parameters for part in self.parts)

    @property
    def buffers(self) -> int:
        """Bytes of all buffers."""
        return sum(part.buffers for part in self.parts)

    @property
    def trained(self) -> int:
        """Number of trained parameters, not bytes."""
        return sum(part.trained for part in self.parts)

    @property
    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(part.gradients for part in self.parts)

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(part.optimizer for part in self.parts)

    @property
    def kept(self) -> int:
        """Bytes that autograd saves in one forward for the backward, without parameters and buffers."""
        return sum(part.kept for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """True if the memory that is still needed is free on the device. None if the free memory is not known."""
        return None if self.free is None else self.peak - self.resident <= self.free

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON.

        Returns:
            All attributes, and the sums over the parts.

        Example:
            >>> estimate = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8)
            >>> estimate.to_dict()["trained"]
            1664
        """
        sums = ("parameters", "buffers", "trained", "gradients", "optimizer", "kept", "fits")
        return {**asdict(self), "notes": list(self.notes), **{name: getattr(self, name) for name in sums}}

    def summary(self) -> str:
        """Return a paragraph with the needed memory, its kinds, and whether it fits.

        Returns:
            The text, without line breaks.

        Example:
            >>> s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8).summary()
            'Training takes ... KiB at most: 343.8 KiB of parameters, 6.5 KiB of gradients, ...'
        """
        return f"{self._peak()}: {', '.join(self._needs())}. {self._verdict()}"

    def lines(self) -> str:
        """Return the summary with one line per kind of memory.

        Returns:
            The text, several lines.

        Example:
            >>> print(s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8).lines())
            Training takes ... KiB at most:
              343.8 KiB of parameters
              ...
        """
        needs = "\n".join(f"  {need}" for need in self._needs())
        return f"{self._peak()}:\n{needs}\n{self._verdict()}"

    def _peak(self) -> str:
        about = "" if self.strategy is None else "about "  # by formulas, see s2ft.estimation.devices
        return f"Training takes {about}{size(self.peak)} at most"

    def _needs(self) -> list[str]:
        """Return the kinds of memory and their sizes."""
        inputs = f"{self.batch}" if self.length is None else f"{self.batch} × {self.length} tokens"
        return [
            f"{size(self.parameters + self.buffers)} of parameters",
            f"{size(self.gradients)} of gradients",
            f"{size(self.optimizer)} of optimizer state",
            f"{size(self.kept)} kept for backward (batch of {inputs})",
            f"and the temporary memory of the {self.peak_in}",
        ]

    def _verdict(self) -> str:
        more = f" in addition to the {size(self.resident)} that are loaded" if self.resident else ""
        if self.free is None:
            return f"The free memory of {self.device} is not known."
        if self.fits:
            return f"{size(self.free)} are free on {self.device}: it fits."
        return (
            f"It will not fit: {size(self.peak - self.resident)} are needed{more}, and {size(self.free)} are free on "
            f"{self.device}. A smaller batch, shorter rows, gradient checkpointing, or weights in a smaller dtype need "
            "less."
        )

    def __str__(self) -> str:
        head = ("part", "parameters", "trained", "gradients", "optimizer", "kept for backward")
        rows = [(name, *_columns(part)) for name, part in (*_folded(self.parts), ("total", self))]
        text = table([head, *rows], right=range(1, len(head)))
        return "\n".join([text, self.summary(), *(f"note: {note}" for note in self.notes)])


def _columns(part: MemoryPart | Estimate) -> tuple[str, ...]:
    return (
        size(part.parameters + part.buffers),
        f"{part.trained:,}",
        size(part.gradients),
        size(part.optimizer),
        size(part.kept),
    )


def _folded(parts: list[MemoryPart]) -> Iterator[tuple[str, MemoryPart]]:
    """Yield a name and a part for each line. Consecutive parts whose lines differ only in a number share one line."""
    for _, run in groupby(parts, lambda part: (re.sub(r"\d+", "#", part.name), *_columns(part))):
        first, *others = run
        last = re.findall(r"\d+", others[-1].name)[-1] if others else None
        yield first.name if last is None else f"{first.name} to {last}, each", first


def size(number: int) -> str:
    """Format a number of bytes, such as 1.5 MiB."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**power:
            return f"{number / 2**power:,.{2 if power == 30 else 1}f} {unit}"
    return f"{number} B"


POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def size_of(value: int | str | None, name: str) -> int | None:
    """Return the bytes of a size such as 24GB or 80 GiB. Both are powers of 1,024, as makers of GPUs use GB.

    Args:
        value: Bytes, a text, or None.
        name: Name of the argument, for the error.

    Raises:
        ValueError: It is no size above 0.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    text = value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"{name} must be a size above 0, such as 24GB, got {value!r}")
    return int(float(found[1]) * 1024 ** POWERS[found[2].upper()])
