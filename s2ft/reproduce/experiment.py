"""Run a recipe: make its runs one after the other, keep each result, and write tables and figures."""

import contextlib
import gc
import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from s2ft.files.reading import read_json
from s2ft.reproduce.figures import save_figures
from s2ft.reproduce.kind import Kind, Planned, kind_of
from s2ft.reproduce.recipe import Recipe, options_of
from s2ft.reproduce.results import DONE, FAILED, Results, Run, machine, now, same_id, versions
from s2ft.reproduce.tables import Table, first_line, published_table
from s2ft.train.lock import LOCK, only_run_in
from s2ft.train.output import write_json

logger = logging.getLogger(__name__)
RECORD, SMOKE = "experiment.json", "smoke"  # in the output folder: which recipe it holds, and what smoke runs use


@dataclass(frozen=True)
class Experiment:
    """The result of :func:`run_recipe`.

    Attributes:
        runs: The runs in the order of the plan.
        tables: The tables, with that of the published numbers.
        files: The files of tables and figures.
    """

    runs: Sequence[Run]
    tables: Sequence[Table] = ()
    files: Sequence[Path] = ()

    @property
    def failed(self) -> list[Run]:
        """The runs that failed."""
        return [run for run in self.runs if run.status == FAILED]


def run_recipe(
    recipe: Recipe,
    output: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    smoke: bool = False,
    resume: bool = False,
    command: str = "",
) -> Experiment:
    """Make all runs of a recipe, and write its tables and figures.

    A run whose configuration has a result in the folder is not made again. A run that fails is recorded and shown, and
    the next one begins. Several processes may work on one folder, for example one on each GPU: each takes a run that no
    other process works on.

    Args:
        recipe: The recipe.
        output: The folder of the results.
        settings: Values for options of the recipe, by name. Names with dots set parts of mappings.
        smoke: Use a tiny random model and made-up data: the run shows that everything works, and no result means
            anything.
        resume: Go on in a folder that has results.
        command: The command line, which is recorded.

    Returns:
        The runs, the tables and the files.

    Raises:
        FileExistsError: The folder holds other files, or results and `resume` is not set.
        ValueError: An option is unknown or has a wrong value, or the recipe cannot run with the options.

    Example:
        >>> from s2ft.reproduce.experiment import run_recipe
        >>> from s2ft.reproduce.recipe import read_recipe
        >>> found = run_recipe(read_recipe("arithmetic"), "smoke", {"methods": ["s2ft"], "seeds": [0]}, smoke=True)
        >>> [run.status for run in found.runs]
        ['done']
    """
    results, kind = Results(output), kind_of(recipe.kind)
    _check_folder(results.folder, recipe, resume)
    options = make_options(recipe, kind, settings or {}, results.folder / SMOKE if smoke else None)
    planned = _planned(recipe, kind, options)
    results.folder.mkdir(parents=True, exist_ok=True)
    write_json(results.folder / RECORD, {"recipe": recipe.name, "options": asdict(options), "command": command})
    with _quick_collection():
        for number, (plan, run) in enumerate(planned, 1):
            _make(kind, options, plan, replace(run, command=command), results, f"{number} of {len(planned)}")
    return report(recipe, kind, options, [run for _, run in planned], results)


def planned_runs(recipe: Recipe, output: str | Path, settings: Mapping[str, Any] | None = None) -> list[Run]:
    """Check everything that :func:`run_recipe` checks before its first run, and return the runs. Nothing is written.

    Args:
        recipe: The recipe.
        output: The folder of the results, which may have some.
        settings: Values for options of the recipe, by name.

    Returns:
        The runs in their order: those with a result in the folder have it, the others are "missing".

    Raises:
        ValueError: As for :func:`run_recipe`.
    """
    kind, results = kind_of(recipe.kind), Results(output)
    _check_folder(results.folder, recipe, resume=True)
    runs = [run for _, run in _planned(recipe, kind, make_options(recipe, kind, settings or {}))]
    return [results.find(run.configuration) or run for run in runs]


def make_options(recipe: Recipe, kind: Kind, settings: Mapping[str, Any], smoke: Path | None = None) -> Any:
    """Return the options of a recipe, with the settings of the user.

    Args:
        recipe: The recipe.
        kind: Its kind.
        settings: Values by name.
        smoke: The folder for what a smoke run needs, or None for a real run.

    Raises:
        ValueError: An option is unknown or has a wrong value.
    """
    if smoke is None:
        return options_of(kind.options, recipe.options, settings)
    options_of(kind.options, recipe.options, recipe.smoke, settings)  # before anything is written
    return options_of(kind.options, recipe.options, recipe.smoke, kind.smoke(smoke), settings)


def _check_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file: choose another")
    record = folder / RECORD
    if not record.is_file():
        if folder.is_dir() and any(path.name not in (LOCK, SMOKE) for path in folder.iterdir()):
            raise FileExistsError(f"output folder {folder} isn't empty and holds no results of s2ft: choose another")
        return
    other = read_json(record).get("recipe")
    if other != recipe.name:
        raise FileExistsError(f"output folder {folder} holds results of the recipe {other}: choose another")
    if not resume:
        raise FileExistsError(
            f"output folder {folder} holds results of this recipe: --resume goes on there and makes only the runs that "
            "have no result yet, or choose another folder"
        )


def _planned(recipe: Recipe, kind: Kind, options: Any) -> list[tuple[Planned, Run]]:
    """The runs of a recipe, without results. Raises ValueError if two of them are the same."""
    plans = kind.plan(options)
    if not plans:
        raise ValueError(f"recipe {recipe.name}: with these options there is nothing to run")
    runs = [Run(recipe.name, plan.labels, {"kind": recipe.kind, **plan.configuration}) for plan in plans]
    twice = same_id(runs)
    if twice:
        raise ValueError(f"recipe {recipe.name}: the same run is planned twice: {', '.join(twice)}")
    return list(zip(plans, runs))


# ---- one run -------------------------------------------------------------------------------------------


def _make(kind: Kind, options: Any, plan: Planned, run: Run, results: Results, place: str) -> None:
    """Make a run and save its result, unless it has one or another process is making it."""
    folder = results.folder_of(run)
    with _reserved(folder) as free:
        found = results.find(run.configuration)
        if found is not None and found.status == DONE:
            logger.info("%s (%s): has a result", run.name, place)
            return
        if not free:
            logger.info("%s (%s): another process is making it", run.name, place)
            return
        logger.info("%s (%s)", run.name, place)
        run = replace(run, date=now(), versions=versions(), machine=machine())
        begin = time.perf_counter()
        try:
            rows = kind.measure(options, plan, folder)
            run = replace(run, status=DONE, rows=rows)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip()
            logger.warning("%s failed: %s", run.name, first_line(text))
            run = replace(run, status=FAILED, error=f"{text}\n\n{traceback.format_exc()}")
        results.save(replace(run, seconds=round(time.perf_counter() - begin, 3)))
        _free_memory()


@contextlib.contextmanager
def _reserved(folder: Path) -> Iterator[bool]:
    """Hold the lock of a run's folder inside the context. Yields False if another process has it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(only_run_in(folder))
            free = True
        except FileExistsError:
            free = False
        yield free


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """Let garbage collections look only at objects that are made inside the context.

    Trainers collect garbage several times a run, and the modules of the libraries alone have a million objects.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the report ----------------------------------------------------------------------------------------


def report(recipe: Recipe, kind: Kind, options: Any, runs: Sequence[Run], results: Results) -> Experiment:
    """Write the tables and figures of the runs that are in the folder, and of those that are missing.

    Args:
        recipe: The recipe.
        kind: Its kind.
        options: Its options.
        runs: The planned runs.
        results: The folder.

    Returns:
        The runs with their results, the tables and the files.
    """
    found = [results.find(run.configuration) for run in runs]
    # A run that was made under another name has the name that it has now.
    made = [run if result is None else replace(result, labels=run.labels) for run, result in zip(runs, found)]
    known = {run.id for run in made}
    others = [run for run in results.all() if run.id not in known]
    if others:
        logger.info("%d results in %s have other options and are not in the tables", len(others), results.folder)
    tables = kind.tables(recipe, options, made)
    published = published_table("published", recipe.published)
    tables = [*tables, *([published] if published else [])]
    files = [file for table in tables for file in table.save(results.folder / "tables")]
    files += save_figures(kind.figures(recipe, options, made), results.folder / "figures")
    return Experiment(made, tables, files)
