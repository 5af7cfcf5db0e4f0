"""Figures of results by matplotlib, which is optional: without it there are tables only."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from s2ft.packages import MissingPackages, check_packages

logger = logging.getLogger(__name__)
KINDS = ("lines", "points", "bars")
FORMS = ("png", "svg")
WIDTH = 7.0  # of a figure, in inches


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        label: Its name in the legend.
        x: Positions: numbers, or words for bars.
        y: Values.
        error: Length of the error bar on each side of a value, or None.
        x_error: The same along x, or None.
        notes: A text beside each point, or None.
    """

    label: str
    x: Sequence[float | str]
    y: Sequence[float]
    error: Sequence[float] | None = None
    x_error: Sequence[float] | None = None
    notes: Sequence[str] | None = None


@dataclass(frozen=True)
class Figure:
    """A figure with one pair of axes.

    Attributes:
        name: Name of its files.
        title: What it shows.
        x: Label of the horizontal axis, with the unit.
        y: Label of the vertical axis, with the unit.
        series: What is drawn.
        kind: "lines" joins the points of a series, "points" does not, "bars" draws groups of bars.
        log: Which axes are logarithmic: "", "x", "y" or "xy".

    Example:
        >>> from s2ft.reproduce.figures import Figure, Series
        >>> Figure("time", "Time of a step", "tokens", "ms", [Series("LoRA", [256, 512], [20.0, 41.0])]).kind
        'lines'
    """

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series] = field(default=())
    kind: str = "lines"
    log: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


def save_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write figures as PNG and SVG.

    Args:
        figures: The figures. One without a point is left out.
        folder: The folder, which is made if it does not exist.

    Returns:
        The files. None without matplotlib, which is logged.
    """
    figures = [figure for figure in figures if any(len(series.y) for series in figure.series)]
    if not figures:
        return []
    try:
        check_packages("figures")
    except MissingPackages as error:
        logger.warning("no figures were drawn: %s", error)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        drawn = draw(figure)
        for form in FORMS:
            written.append(folder / f"{figure.name}.{form}")
            drawn.savefig(written[-1], dpi=150)
    return written


def draw(figure: Figure):
    """Draw a figure.

    Args:
        figure: What to draw.

    Returns:
        A matplotlib Figure, which belongs to no window.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, 4.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    if figure.kind == "bars":
        _bars(axes, figure.series)
    else:
        for number, series in enumerate(figure.series):
            _points(axes, series, "-" if figure.kind == "lines" else "", number)
    axes.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    axes.title.set_size("medium")
    if "x" in figure.log:
        axes.set_xscale("log")
    if "y" in figure.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, axis="y" if figure.kind == "bars" else "both")
    axes.set_axisbelow(True)
    if len(figure.series) > 1 or figure.series[0].label:
        canvas.legend(loc="outside lower center", ncols=_legend_columns(figure.series), frameon=False)
    return canvas


def _legend_columns(several: Sequence[Series]) -> int:
    """Return how many columns of the legend fit into the width of the figure."""
    longest = max(len(series.label) for series in several)
    return max(1, min(4, len(several), int(WIDTH / (0.6 + 0.08 * longest))))  # inches of a marker and of a letter


def _points(axes, series: Series, line: str, number: int) -> None:
    axes.errorbar(
        series.x,
        series.y,
        yerr=series.error,
        xerr=series.x_error,
        label=series.label,
        linestyle=line,
        marker="osD^vP*Xh<>p"[number % 12],  # so that series can be told apart without colours
        capsize=3,
    )
    for x, y, note in zip(series.x, series.y, series.notes or ()):
        axes.annotate(note, (x, y), xytext=(5, 4), textcoords="offset points", fontsize="x-small", color="0.4")


def _bars(axes, several: Sequence[Series]) -> None:
    words = list(dict.fromkeys(str(x) for series in several for x in series.x))
    width = 0.8 / len(several)
    for number, series in enumerate(several):
        places = [words.index(str(x)) + (number - (len(several) - 1) / 2) * width for x in series.x]
        axes.bar(places, series.y, width, yerr=series.error, label=series.label, capsize=2)
    axes.set_xticks(
        range(len(words)), words, rotation=30 if len(words) > 5 else 0, ha="right" if len(words) > 5 else "center"
    )
