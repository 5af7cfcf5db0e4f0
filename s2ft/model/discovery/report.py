"""What discovery says: the couplings, and for every weight of the blocks how it is trained, or why it is not."""

from dataclasses import dataclass

from s2ft.files.tables import table
from s2ft.model.coupling import Coupling

STATUSES = ("confirmed", "movable", "in place", "one-sided", "untouched")


@dataclass(frozen=True)
class WeightRow:
    """What discovery says of one weight of a block.

    Attributes:
        path: Path of the layer, or of the parameter with the weights of experts.
        status: "confirmed": a trial showed that its units can move together with those of other weights. "in place":
            it is part of an attention or FFN whose units stay where they are. "one-sided": it is trained by itself.
            "untouched": it is not trained. "movable": as confirmed, but a family of s2ft declares it, without a trial.
        reason: Why, in words.
        coupling: The coupling that it is in, the first one for experts; None if it is untouched.
    """

    path: str
    status: str
    reason: str
    coupling: Coupling | None = None


@dataclass(frozen=True)
class Discovery:
    """The couplings that s2ft finds in a model. It prints as a table.

    Attributes:
        couplings: The couplings, those of the first layer first.
        weights: A row for every weight of the blocks.
    """

    couplings: list[Coupling]
    weights: list[WeightRow]

    def to_dict(self) -> dict:
        """Convert to a dict for JSON: the couplings, and the rows without them."""
        rows = [{"path": row.path, "status": row.status, "reason": row.reason} for row in self.weights]
        return {"couplings": [coupling.to_dict() for coupling in self.couplings], "weights": rows}

    def __str__(self) -> str:
        """The summary, under the rows: weights that differ in numbers only, with the same status, are one row."""
        grouped: dict[tuple[str, str, str], list[str]] = {}
        for row in self.weights:
            name = ".".join("*" if part.isdigit() else part for part in row.path.split("."))
            grouped.setdefault((name, row.status, row.reason), []).append(row.path)
        lines = [(name, str(len(paths)), status, why) for (name, status, why), paths in grouped.items()]
        return "\n".join([*table([("weight", "number", "status", "why"), *lines]).splitlines(), self.summary])

    @property
    def summary(self) -> str:
        """One line: how many couplings, and how many weights have each status."""
        counts = {status: sum(row.status == status for row in self.weights) for status in STATUSES}
        words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        return f"{len(self.couplings)} couplings; weights of the blocks: {words or 'none'}"
