"""The one printer of tables: columns of equal width, two spaces apart."""

from collections.abc import Collection, Iterable, Sequence


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
