"""What a kind of experiment is, and how one is found by its name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from s2ft.reproduce.figures import Figure
from s2ft.reproduce.recipe import Recipe, closest
from s2ft.reproduce.results import Run
from s2ft.reproduce.tables import Table

FOLDER = files("s2ft.reproduce") / "studies"


@dataclass(frozen=True)
class Planned:
    """A run that an experiment consists of.

    Attributes:
        labels: Short words that tell the runs apart in tables, such as method and seed. They are in the order in which
            they are shown.
        configuration: Everything that determines the result, as JSON values. A run with the same configuration is not
            repeated.
    """

    labels: dict[str, Any]
    configuration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A kind of experiment. A file of s2ft/reproduce/studies defines one as KIND.

    Attributes:
        options: Dataclass of the options. Each field has a help text, see :func:`s2ft.train.options.option`. The
            command's options --model, --method, --data and --seeds set the fields `model`, `methods`, `data` and
            `seeds`, if there are such fields.
        plan: Checks the options and returns the runs. What would fail hours later fails here.
        measure: Makes one run: of the options, the run and a folder for its files. It returns rows of numbers by
            name, at least one.
        tables: Tables of all runs, of the recipe, the options and the runs in the order of the plan. A run that failed
            or is not there yet has no rows; see :func:`s2ft.reproduce.tables.summary`.
        figures: Figures of all runs, likewise.
        smoke: Writes what a smoke run needs into a folder, such as a tiny model, and returns the options with which it
            is used.
    """

    options: type
    plan: Callable[[Any], list[Planned]]
    measure: Callable[[Any, Planned, Path], list[dict[str, Any]]]
    tables: Callable[[Recipe, Any, Sequence[Run]], list[Table]]
    figures: Callable[[Recipe, Any, Sequence[Run]], list[Figure]] = lambda recipe, options, runs: []
    smoke: Callable[[Path], dict[str, Any]] = lambda folder: {}


def kind_of(name: str) -> Kind:
    """Return a kind of experiment.

    Args:
        name: The name of a module of s2ft/reproduce/studies.

    Raises:
        ValueError: There is no such kind.

    Example:
        >>> from s2ft.reproduce.kind import kind_of
        >>> kind_of("accuracy").options.__name__
        'AccuracyOptions'
    """
    known = sorted(file.name.removesuffix(".py") for file in FOLDER.iterdir() if file.name.endswith(".py"))
    known.remove("__init__")
    if name not in known:
        raise ValueError(f"there is no kind of experiment {name!r}{closest(name, known)}; known are {', '.join(known)}")
    return import_module(f"s2ft.reproduce.studies.{name}").KIND
