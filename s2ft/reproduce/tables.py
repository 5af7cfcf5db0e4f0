"""Tables of results as text, CSV, LaTeX and Markdown, with the mean and the standard deviation over the seeds."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2ft.files.writing import replace_file
from s2ft.reproduce.results import DONE, FAILED, MISSING, Run

WORDS = {FAILED: "failed", MISSING: "not run"}  # in the cells of runs without a result
FORMS = {"text": "txt", "csv": "csv", "latex": "tex", "markdown": "md"}  # forms of a table, and the ends of their files
LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "²": r"$^2$",
    "×": r"$\times$",
    "–": "--",
    "→": r"$\to$",
}


@dataclass(frozen=True)
class Spread:
    """The mean of some values and how much they differ.

    Attributes:
        mean: The mean.
        sd: The standard deviation of the sample (with n - 1), or None for a single value.
        number: Number of values.
    """

    mean: float
    sd: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value.

        Example:
            >>> from s2ft.reproduce.tables import Spread
            >>> Spread.of([1.0, 2.0, 3.0])
            Spread(mean=2.0, sd=1.0, number=3)
        """
        if not all(math.isfinite(value) for value in values):
            return cls(math.nan, None, len(values))
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        """Return the spread as text, in which `form` is the format of a number."""
        return f"{self.mean:{form}}" + (f" ± {self.sd:{form}}" if self.sd is not None else "")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: The key of its values in rows.
        title: Its heading. The default is the name.
        form: Format of its numbers, as in :func:`format`.
    """

    name: str
    title: str = ""
    form: str = "g"

    @property
    def heading(self) -> str:
        """The text of the heading."""
        return self.title or self.name


@dataclass(frozen=True)
class Table:
    """A table whose cells are text, numbers, :class:`Spread` or None.

    Attributes:
        name: Name of its files.
        title: What it shows.
        columns: The columns.
        rows: Cells of each row, as many as there are columns.
        notes: Lines below the table.

    Example:
        >>> from s2ft.reproduce.tables import Column, Spread, Table
        >>> columns = [Column("method"), Column("accuracy", "accuracy %", ".1f")]
        >>> print(Table("mine", "My data", columns, [["LoRA", Spread.of([60.0, 62.0])], ["full", 61.25]]).text())
        My data
        method   accuracy %
        LoRA     61.0 ± 1.4
        full           61.2
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name}: a row has {len(row)} cells for {len(self.columns)} columns")

    def cells(self) -> list[list[str]]:
        """Return the heading and all cells as text."""
        return [
            [column.heading for column in self.columns],
            *([_shown(cell, column.form) for cell, column in zip(row, self.columns)] for row in self.rows),
        ]

    def text(self) -> str:
        """Return the table for a terminal."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells)]
        lefts = [self._is_text(place) for place in range(len(self.columns))]
        pads = [str.ljust if left else str.rjust for left in lefts]
        lines = ["   ".join(pad(*cell) for pad, cell in zip(pads, zip(row, widths))).rstrip() for row in cells]
        return "\n".join([self.title, *lines, *self.notes])

    def csv(self) -> str:
        """Return the table as CSV. A column with spreads becomes three: mean, standard deviation, number."""
        spread = [any(isinstance(row[place], Spread) for row in self.rows) for place in range(len(self.columns))]
        output = io.StringIO()
        writer = csv.writer(output, lineterminator="\n")
        heading: list[str] = []
        for column, several in zip(self.columns, spread):
            heading += [column.name, f"{column.name}_sd", f"{column.name}_n"] if several else [column.name]
        writer.writerow(heading)
        for row in self.rows:
            cells: list[Any] = []
            for cell, several in zip(row, spread):
                if isinstance(cell, Spread):
                    cells += [cell.mean, "" if cell.sd is None else cell.sd, cell.number]
                else:
                    cells += [cell, "", ""] if several else [cell]
            writer.writerow(["" if cell is None else cell for cell in cells])
        return output.getvalue()

    def latex(self) -> str:
        """Return the table as LaTeX that needs no package: a table environment with a caption."""
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in self.cells()]
        notes = " ".join(map(_escaped, self.notes))
        sides = "".join("l" if self._is_text(place) else "r" for place in range(len(self.columns)))
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{_escaped(self.title)}. {notes}}}".replace(". }", ".}"),
                rf"\begin{{tabular}}{{{sides}}}",
                r"\hline",
                lines[0],
                r"\hline",
                *lines[1:],
                r"\hline",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def markdown(self) -> str:
        """Return the table as Markdown."""
        head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in self.cells())
        sides = ["---" if self._is_text(place) else "--:" for place in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (head, sides, *rows)]
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", *lines, *notes, ""])

    def save(self, folder: Path) -> list[Path]:
        """Write the table in every form.

        Args:
            folder: The folder, which is made if it does not exist.

        Returns:
            The files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for form, end in FORMS.items():
            written.append(folder / f"{self.name}.{end}")
            text = getattr(self, form)()
            replace_file(written[-1], (text if text.endswith("\n") else text + "\n").encode())
        return written

    def _is_text(self, place: int) -> bool:
        return not any(isinstance(row[place], (int, float, Spread)) for row in self.rows)


def _shown(cell: Any, form: str) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Spread):
        return cell.text(form)
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return f"{cell:{form}}"
    return str(cell)


def _escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


# ---- a table of runs -----------------------------------------------------------------------------------


def summary(
    name: str,
    title: str,
    runs: Sequence[Run],
    by: Sequence[Column],
    values: Sequence[Column],
    notes: Sequence[str] = (),
) -> Table:
    """Make a table of runs: a row for each combination of labels. Over other labels, such as the seed, it averages.

    Failed runs and runs that are not there stay visible: a row without any result says so in its first cell of values,
    and a note names every run that is missing from a mean.

    Args:
        name: Name of the table's files.
        title: What it shows.
        runs: The runs.
        by: Columns whose values, from the labels or from the rows, tell the table's rows apart.
        values: Columns of numbers. A value that is text or that all rows share as a whole number is shown as it is. A
            column without any value is left out.
        notes: More lines below the table.

    Returns:
        The table.

    Example:
        >>> from s2ft.reproduce.results import Run
        >>> from s2ft.reproduce.tables import Column, summary
        >>> runs = [Run("mine", {"method": "lora", "seed": n}, {}, "done", [{"loss": 1.0 + n}]) for n in (0, 1)]
        >>> runs.append(Run("mine", {"method": "full", "seed": 0}, {}, "failed", error="out of memory"))
        >>> print(summary("t", "Loss", runs, [Column("method")], [Column("loss", form=".2f")]).text())
        Loss
        method          loss
        lora     1.50 ± 0.71
        full          failed
        mean ± standard deviation over 2 runs
        failed: full seed 0: out of memory
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    states: dict[tuple, str] = {}
    for run in runs:
        for row in run.rows if run.status == DONE else [{}]:
            found = {**run.labels, **row}
            key = tuple(found.get(column.name) for column in by)
            groups.setdefault(key, [])
            if run.status == DONE:
                groups[key].append(found)
            else:
                states[key] = WORDS[run.status]
    seen = {name for found in groups.values() for row in found for name, value in row.items() if value is not None}
    values = [column for column in values if column.name in seen] or list(values)[:1]
    rows = []
    for key, found in groups.items():
        cells = [_cell([row[column.name] for row in found if row.get(column.name) is not None]) for column in values]
        if not found:
            cells = [states[key], *[None] * (len(values) - 1)]
        rows.append([*key, *cells])
    return Table(name, title, [*by, *values], rows, [*_spreads(rows), *notes, *_absent(runs)])


def _cell(values: list[Any]) -> Any:
    if not values:
        return None
    if isinstance(values[0], (str, bool)):
        return ", ".join(map(str, dict.fromkeys(values)))
    if all(isinstance(value, int) and value == values[0] for value in values):
        return values[0]
    return Spread.of([float(value) for value in values])


def _spreads(rows: Sequence[Sequence[Any]]) -> list[str]:
    numbers = sorted({cell.number for row in rows for cell in row if isinstance(cell, Spread) and cell.number > 1})
    return [f"mean ± standard deviation over {' or '.join(map(str, numbers))} runs"] if numbers else []


def _absent(runs: Sequence[Run]) -> list[str]:
    failed = [f"failed: {run.name}: {first_line(run.error)}" for run in runs if run.status == FAILED]
    missing = [run.name for run in runs if run.status == MISSING]
    return failed + ([f"not run yet: {', '.join(missing)}"] if missing else [])


def first_line(error: str | None) -> str:
    """Return the first line of an error's text."""
    return (error or "").strip().split("\n")[0]


def published_table(name: str, published: Mapping[str, Any]) -> Table | None:
    """Return the published numbers of a recipe as a table, or None if it has none.

    Args:
        name: Name of the table's files.
        published: `source` and `rows`, as in a recipe.
    """
    rows = published.get("rows") or []
    if not rows:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(key) for key in keys] for row in rows]
    return Table(name, f"Published: {published['source']}", [Column(key) for key in keys], cells)
