"""What an estimate says, as a table and in a sentence."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """What a layer, or another part of the model, takes: bytes, but for `trained`."""

    name: str
    parameters: int  # frozen ones and deltas; a tied weight where it comes first
    buffers: int
    trained: int  # numbers
    gradients: int
    optimizer: int
    kept: int  # for backward


@dataclass(frozen=True)
class Estimate:
    """What training will take, in bytes; prints as a table, a line for each part and alike layers in one."""

    parts: list[Part]
    batch: int  # sequences, images or recordings of one forward
    length: int | None  # tokens of each; None where inputs are no tokens
    device: str
    peak: int  # most that is alive at once in a step, everything together
    peak_in: str  # forward, backward or optimizer: where
    resident: int  # of it, what is on the device already: the weights of a model that is loaded
    free: int | None  # on the device now; None where that isn't known
    notes: tuple[str, ...]  # what the numbers rest on

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def buffers(self) -> int:
        return sum(part.buffers for part in self.parts)

    @property
    def trained(self) -> int:
        """Numbers, not bytes."""
        return sum(part.trained for part in self.parts)

    @property
    def gradients(self) -> int:
        return sum(part.gradients for part in self.parts)

    @property
    def optimizer(self) -> int:
        return sum(part.optimizer for part in self.parts)

    @property
    def kept(self) -> int:
        """What autograd saves in one forward for the backward, each storage once, without parameters and buffers."""
        return sum(part.kept for part in self.parts)

    @property
    def fits(self) -> bool | None:
        """Whether what is not there yet fits into the memory that is free; None where that isn't known."""
        return None if self.free is None else self.peak - self.resident <= self.free

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        sums = ("parameters", "buffers", "trained", "gradients", "optimizer", "kept", "fits")
        return {**asdict(self), "notes": list(self.notes), **{name: getattr(self, name) for name in sums}}

    def summary(self) -> str:
        """A short paragraph: what is needed, of what, and whether it fits."""
        return f"Training takes {size(self.peak)} at most: {', '.join(self._needs())}. {self._verdict()}"

    def lines(self) -> str:
        """Return the summary with one line for each kind of memory."""
        needs = "\n".join(f"  {need}" for need in self._needs())
        return f"Training takes {size(self.peak)} at most:\n{needs}\n{self._verdict()}"

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
        needed = self.peak - self.resident
        more = f" beside the {size(self.resident)} that are loaded" if self.resident else ""
        if self.free is None:
            return f"How much is free on {self.device} is not known."
        if self.fits:
            return f"{size(self.free)} are free on {self.device}: it fits."
        return (
            f"It will not fit: {size(needed)} are needed{more}, and {size(self.free)} are free on {self.device}. "
            "A smaller batch, shorter rows, gradient checkpointing, or weights in a smaller dtype need less."
        )

    def __str__(self) -> str:
        rows = [("part", "parameters", "trained", "gradients", "optimizer", "kept for backward")]
        rows += [(name, *_columns(part)) for name, part in _folded(self.parts)]
        rows.append(("in all", *_columns(self)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
            for row in rows
        ]
        return "\n".join([*lines, self.summary(), *(f"note: {note}" for note in self.notes)])


def _columns(part: Part | Estimate) -> tuple[str, ...]:
    return (
        size(part.parameters + part.buffers),
        f"{part.trained:,}",
        size(part.gradients),
        size(part.optimizer),
        size(part.kept),
    )


def _folded(parts: list[Part]) -> Iterator[tuple[str, Part]]:
    """Consecutive parts whose lines differ in a number of their names only as one line: its name, and one of them."""
    runs: list[list[Part]] = []
    for part in parts:
        if runs and _alike(part) == _alike(runs[-1][0]):
            runs[-1].append(part)
        else:
            runs.append([part])
    for run in runs:
        last = re.findall(r"\d+", run[-1].name)
        yield (f"{run[0].name} to {last[-1]}, each" if len(run) > 1 else run[0].name), run[0]


def _alike(part: Part) -> tuple[str, ...]:
    """The line without numbers in the name."""
    return re.sub(r"\d+", "#", part.name), *_columns(part)


def size(number: int) -> str:
    """Bytes for people."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 2**power:
            return f"{number / 2**power:,.{2 if power == 30 else 1}f} {unit}"
    return f"{number} B"
