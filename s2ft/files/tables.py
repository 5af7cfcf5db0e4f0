"""Tables: values collected by a key, and lines printed in columns of equal width, two spaces apart."""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

Key, Value = TypeVar("Key"), TypeVar("Value")


def by_key(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Collect the values of pairs by their keys, in the order in which they come.

    Example:
        >>> from s2ft.files.tables import by_key
        >>> by_key([("q", 1), ("k", 2), ("q", 3)])
        {'q': [1, 3], 'k': [2]}
    """
    found: dict[Key, list[Value]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def table(lines: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return lines of cells as text with aligned columns.

    Args:
        lines: The lines, of one length; the first one may be the headings.
        right: Columns that are aligned at their right side, counted from 0. All others are aligned at their left side.

    Example:
        >>> from s2ft.files.tables import table
        >>> print(table([("layer", "units"), ("q_proj", "7")], right={1}))
        layer   units
        q_proj      7
    """
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
