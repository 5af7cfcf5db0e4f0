"""Makes the runs of an experiment and keeps each result as a line of one file, so that it can be interrupted.

A run has labels, which tell it apart in tables, and settings, which determine its numbers. A run whose settings have a
result is not made again. What fails has a line with its error, and is tried again by the next call; what does not fit
into memory is a result.
"""

import difflib
import hashlib
import json
import multiprocessing
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import s2ft
from bench.harness import processor
from s2ft.train.device import first_line, is_out_of_memory

DONE, FAILED, OOM = "done", "failed", "out of memory"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "safetensors")


@dataclass(frozen=True)
class ExperimentRun:
    """A run of an experiment.

    Attributes:
        labels: Short words and numbers that tell the runs apart, in the order in which they are shown.
        settings: Everything that its numbers depend on, JSON values.
    """

    labels: dict[str, Any]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """The labels as text, which is also the name of the run's folder."""
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.labels.values())

    @property
    def digest(self) -> str:
        """The first digits of the SHA-256 of the settings. The order of the keys does not matter.

        It leaves out the folder of the data: a digest of what the files hold is in `files`.
        """
        known = {name: value for name, value in self.settings.items() if name != "data"}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Stage:
    """Runs that are made together.

    Attributes:
        runs: The runs.
        alone: Whether each run has all cores for itself, because its time and memory count.
        fresh: Whether each run has a process of its own, so that nothing of an earlier run is in its memory.
    """

    runs: Sequence[ExperimentRun]
    alone: bool = False
    fresh: bool = False


@dataclass
class Results:
    """The results of an experiment.

    Args:
        file: A file with one JSON object a line. Of several lines with the same settings the last one counts.

    Attributes:
        lines: The lines by digest.
    """

    file: Path
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ValueError(f"{self.file}, line {number} is not JSON: {error}; delete the line") from None
            self.lines[line["digest"]] = line

    def line(self, run: ExperimentRun) -> dict[str, Any] | None:
        """Return the line of a run: a result, or what failed; None if it was not made."""
        return self.lines.get(run.digest)

    def rows(self, run: ExperimentRun) -> list[dict[str, Any]]:
        """Return what a run measured, empty without a result."""
        return (self.line(run) or {}).get("rows", [])

    def row(self, run: ExperimentRun) -> dict[str, Any] | None:
        """Return what a run of one row measured, or None without a result."""
        return next(iter(self.rows(run)), None)

    def needs(self, run: ExperimentRun) -> bool:
        """Return whether a run has no result yet, or failed."""
        return (self.line(run) or {}).get("status") not in (DONE, OOM)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line to the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.lines[line["digest"]] = line


def make(
    kind: str,
    stages: Sequence[Stage],
    results: Results,
    *,
    workers: int | None = None,
    seconds: float = float("inf"),
    part: tuple[int, int] = (0, 1),
    show: Callable[[str], None] = partial(print, flush=True),
) -> bool:
    """Make the runs that have no result.

    Args:
        kind: The module of this folder whose `measure` makes a run.
        stages: The stages, one after the other.
        results: The results.
        workers: Number of processes of one thread; None is the number of cores, 0 makes all runs in this process.
        seconds: Start no run after so many seconds.
        part: Make only every n-th run, from the k-th on, as (k, n): for several processes that share a file.
        show: Shows a line of text.

    Returns:
        Whether every run has a result.
    """
    end, complete = time.monotonic() + seconds, True
    cores = os.cpu_count() or 1
    for stage in stages:
        unique = {run.digest: run for run in stage.runs}
        todo = [run for run in list(unique.values())[part[0] :: part[1]] if results.needs(run)]
        show(f"{len(todo)} of {len(unique)} runs to do")
        many = workers if workers == 0 else 1 if stage.alone else workers or cores
        for run, future in _made(kind, todo, many, cores if stage.alone else 1, stage.fresh, results.file.parent, end):
            line = _line(kind, run, future)
            results.add(line)
            shown = line.get("error", "").split("\n")[0] or f"{line['seconds']:.0f} s"
            show(f"{time.strftime('%H:%M:%S')} {run.name}: {line['status']}, {shown}")
        complete = complete and not any(map(results.needs, unique.values()))
    return complete


def _made(
    kind: str, todo: list[ExperimentRun], workers: int, threads: int, fresh: bool, folder: Path, end: float
) -> Iterator[tuple[ExperimentRun, Future]]:
    """Make runs and yield each with its future, which is done."""
    while todo and not workers and time.monotonic() < end:
        yield (run := todo.pop(0)), _here(kind, run, folder)
    context = multiprocessing.get_context("spawn")
    while todo and time.monotonic() < end:
        with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(threads,)) as pool:
            waiting: dict[Future, ExperimentRun] = {}
            left, broken = 1 if fresh else len(todo), False
            while True:
                while left and not broken and len(waiting) < workers and time.monotonic() < end:
                    run, left = todo.pop(0), left - 1
                    waiting[pool.submit(measured, kind, run, folder)] = run
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    broken = broken or isinstance(future.exception(), BrokenExecutor)  # the others go on in a new pool
                    yield waiting.pop(future), future


def _start(threads: int) -> None:
    """Side by side, workers have one thread each, so as not to disturb each other."""
    torch.set_num_threads(threads)


def _here(kind: str, run: ExperimentRun, folder: Path) -> Future:
    future: Future = Future()
    try:
        future.set_result(measured(kind, run, folder))
    except Exception as error:
        future.set_exception(error)
    return future


def measured(kind: str, run: ExperimentRun, folder: Path) -> dict[str, Any]:
    """Make a run in this process.

    Args:
        kind: The module of this folder whose `measure(settings, folder)` returns rows of numbers by name.
        run: The run.
        folder: The folder of the results. The run's own files are in `runs/NAME-DIGEST`.

    Returns:
        The status, the rows or the error, the time and where it was made.
    """
    begin = time.perf_counter()
    try:
        place = folder / "runs" / f"{run.name.replace('/', '-')}-{run.digest}"
        found = {"status": DONE, "rows": import_module(f"bench.experiments.{kind}").measure(run.settings, place)}
    except Exception as error:
        if is_out_of_memory(error):
            found = {"status": OOM, "rows": [], "error": first_line(error)}
        else:
            found = {"status": FAILED, "error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
    return {**found, "seconds": time.perf_counter() - begin, "machine": where()}


def _line(kind: str, run: ExperimentRun, future: Future) -> dict[str, Any]:
    head = {"kind": kind, "labels": run.labels, "digest": run.digest, "settings": run.settings}
    try:
        return {**head, **future.result()}
    except Exception as error:  # the system ends a process that takes too much memory
        return {**head, "status": FAILED, "error": f"its process ended: {error}", "seconds": 0.0}


def where() -> dict[str, Any]:
    """Return what a number depends on besides the settings: the processor, the GPU, the day and the versions."""
    found = {"processor": processor(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    found |= {"s2ft": s2ft.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def check_names(where: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that is not known, with the closest one that is."""
    known = list(known)
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{where}: there is no {name!r}{hint}; known are {', '.join(known)}")


def file_digest(path: Path) -> str:
    """Return the first digits of the SHA-256 of a file, so that a result belongs to what was read."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()[:16]
