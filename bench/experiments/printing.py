"""Tables in Markdown and figures by matplotlib, without which there are tables only."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.experiments.runner import DONE, ExperimentRun, Results
from s2ft.files.plain_text import replace_file
from s2ft.packages import MissingPackages, check_packages
from s2ft.train.tuners import TUNERS

logger = logging.getLogger(__name__)
FORMS = ("png", "svg")
WIDTH = 7.0  # of a figure, in inches
# One hue for S²FT and one for LoRA and its variants. Grey is for all other methods, and for text.
HUES = {"s2ft": "#0d9488", **dict.fromkeys(("lora", "dora", "rslora"), "#d97706")}
GREY = "#808080"


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
            >>> from bench.experiments.printing import Spread
            >>> Spread.of([1.0, 2.0, 3.0])
            Spread(mean=2.0, sd=1.0, number=3)
        """
        if not all(math.isfinite(value) for value in values):
            return cls(math.nan, None, len(values))
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: The key of its values in rows.
        title: Its heading; the default is the name.
        form: Format of its numbers, as in :func:`format`.
    """

    name: str
    title: str = ""
    form: str = "g"


@dataclass(frozen=True)
class Table:
    """A table whose cells are text, numbers, :class:`Spread` or None.

    Attributes:
        name: Name of its file.
        title: What it shows.
        columns: The columns.
        rows: Cells of each row, as many as there are columns.
        notes: Lines below the table.

    Example:
        >>> from bench.experiments.printing import Column, Spread, Table
        >>> columns = [Column("method"), Column("accuracy", "accuracy %", ".1f")]
        >>> print(Table("mine", "My data", columns, [["LoRA", Spread.of([60.0, 62.0])], ["full", 61.25]]).markdown())
        **My data**
        <BLANKLINE>
        | method | accuracy % |
        | --- | --: |
        | LoRA | 61.0 ± 1.4 |
        | full | 61.2 |
        <BLANKLINE>
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = field(default=())

    def markdown(self) -> str:
        """Return the table as Markdown."""
        cells = [
            [_shown(cell, column.form) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]
        head = [column.title or column.name for column in self.columns]
        numbers = [any(isinstance(row[n], (int, float, Spread)) for row in self.rows) for n in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["--:" if one else "---" for one in numbers], *cells)]
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([f"**{self.title}**", "", *lines, *notes, ""])

    def save(self, folder: Path) -> None:
        """Write the table to a file in a folder, which is made if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{self.name}.md", (self.markdown().rstrip("\n") + "\n").encode())


def _shown(cell: Any, form: str) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Spread):
        return f"{cell.mean:{form}}" + (f" ± {cell.sd:{form}}" if cell.sd is not None else "")
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return f"{cell:{form}}"
    return str(cell).replace("|", "\\|")


def cell_of(values: Sequence[Any]) -> Any:
    """Return a cell for values of several runs: text and equal whole numbers as they are, else their spread."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if isinstance(values[0], (str, bool)):
        return ", ".join(map(str, dict.fromkeys(values)))
    if all(isinstance(value, int) and value == values[0] for value in values):
        return values[0]
    return Spread.of([float(value) for value in values])


def summary(
    name: str, title: str, runs: Sequence[ExperimentRun], results: Results, by: Sequence[Column],
    values: Sequence[Column], notes: Sequence[str] = (),
) -> Table:  # fmt: skip
    """Make a table of runs: a row for each combination of some labels. Over the others, such as the seed, it averages.

    Failed runs and runs that are not there stay visible: a row without any result says so, and a note names the runs.

    Args:
        name: Name of the table's file.
        title: What it shows.
        runs: The runs.
        results: Their results.
        by: Columns whose values, from the labels or from the rows, tell the table's rows apart.
        values: Columns of numbers. A column without any value is left out.
        notes: More lines below the table.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for run in runs:
        for row in results.rows(run) or [None]:
            found = {**run.labels, **(row or {})}
            groups.setdefault(tuple(found.get(column.name) for column in by), []).extend([found] if row else [])
    seen = {name for found in groups.values() for row in found for name, value in row.items() if value is not None}
    values = [column for column in values if column.name in seen] or list(values)[:1]
    rows = []
    for key, found in groups.items():
        cells = [cell_of([row.get(column.name) for row in found]) for column in values]
        rows.append([*key, *(cells if found else ["not run", *[None] * (len(values) - 1)])])
    numbers = sorted({cell.number for row in rows for cell in row if isinstance(cell, Spread) and cell.number > 1})
    spread = [f"mean ± standard deviation over {' or '.join(map(str, numbers))} runs"] if numbers else []
    return Table(name, title, [*by, *values], rows, [*spread, *notes, *failures(runs, results)])


def failures(runs: Sequence[ExperimentRun], results: Results) -> list[str]:
    """Return notes that name the runs without a result, and why."""
    lines = [(run, results.line(run)) for run in runs]
    failed = [
        f"{run.name} {line['status']}: {line.get('error', '').splitlines()[0]}"
        for run, line in lines
        if line and line["status"] != DONE
    ]
    missing = [run.name for run, line in lines if line is None]
    return failed + ([f"not run yet: {', '.join(missing)}"] if missing else [])


# ---- figures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        label: Its name, beside its last point.
        x: Positions.
        y: Values.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Figure:
    """A figure with one pair of axes.

    Attributes:
        name: Name of its files.
        title: What it shows.
        x: Label of the horizontal axis, with the unit.
        y: Label of the vertical axis, with the unit.
        series: What is drawn.
    """

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series]


def save_figures(figures: Sequence[Figure], folder: Path, prefix: str = "") -> None:
    """Write figures as PNG and SVG. Without matplotlib nothing is drawn, which is logged.

    Args:
        figures: The figures. One without a point is left out.
        folder: The folder, which is made if it does not exist.
        prefix: Begins the names of the files.
    """
    figures = [figure for figure in figures if any(len(series.y) for series in figure.series)]
    try:
        check_packages("figures")
    except MissingPackages as error:
        logger.warning("no figures were drawn: %s", error)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        drawn = draw(figure)
        for form in FORMS:
            drawn.savefig(folder / f"{prefix}{figure.name}.{form}", dpi=150, transparent=True)


def draw(figure: Figure):
    """Return a figure as a matplotlib Figure, which belongs to no window. It is readable on white and on black."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, 4.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    for number, series in enumerate(figure.series):
        marker = "osD^vP*Xh<>p"[number % 12]  # so that series can be told apart without colours
        axes.plot(series.x, series.y, color=hue_of(series.label), marker=marker)
    axes.set_title(figure.title, size="medium", color=GREY)
    axes.set_xlabel(figure.x, color=GREY)
    axes.set_ylabel(figure.y, color=GREY)
    axes.tick_params(colors=GREY)
    axes.spines[:].set_color(GREY)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    left, right = axes.get_xlim()
    axes.set_xlim(left, right + 0.3 * (right - left))  # room for labels
    canvas.draw_without_rendering()  # so that the labels know where the points are
    label_ends(axes, figure.series)
    return canvas


def hue_of(label: str) -> str:
    """The colour of a method, whose title the label begins with."""
    return next((hue for name, hue in HUES.items() if label.startswith(TUNERS[name].title)), GREY)


def label_ends(axes, series: Sequence[Series]) -> None:
    """Write each label beside the last point of its series, above the labels that are in its way."""
    taken: list[tuple[float, float, float]] = []
    ends = [(*axes.transData.transform((one.x[-1], one.y[-1])), one) for one in series if len(one.y)]
    for x, y, one in sorted(ends, key=lambda end: end[1]):
        left, right, place = x + 8, x + 8 + 7 * len(one.label), y - 4
        while any(first < right and left < last and abs(place - other) < 12 for first, last, other in taken):
            place += 1
        taken.append((left, right, place))
        where = {"xytext": (8 * 72 / 100, (place - y) * 72 / 100), "textcoords": "offset points"}
        axes.annotate(one.label, (one.x[-1], one.y[-1]), color=hue_of(one.label), size="small", **where)
