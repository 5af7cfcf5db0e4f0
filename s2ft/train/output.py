"""The output folder of a run: what stands where, and who may write into it."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from s2ft.adapter.folders import ADAPTER, RUN
from s2ft.files.adapter_folder import CONFIG
from s2ft.files.reading import read_json
from s2ft.train.checkpoints import UNFINISHED, checkpoints, newest_valid
from s2ft.train.lock import LOCK, only_run_in
from s2ft.train.options import NOT_PART_OF_A_RUN

logger = logging.getLogger(__name__)
LOG, PLOT, REPORT = "log.jsonl", "loss.png", "report.json"


class RunFolder:
    """adapter/, checkpoint-N/, log.jsonl, loss.png, run.json (the options), report.json under one path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.adapter, self.log, self.plot = self.path / ADAPTER, self.path / LOG, self.path / PLOT
        self.run, self.report = self.path / RUN, self.path / REPORT

    def check(self, resume: bool = False, overwrite: bool = False) -> None:
        """Raises: FileExistsError if the folder holds something that this run must not touch;
        FileNotFoundError if there is no run to resume. Changes nothing."""
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other")
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"output {self.path} is a file")
        holds_run = self.run.is_file()
        if resume:
            if not holds_run:
                raise FileNotFoundError(f"output {self.path} holds no run to resume")
        elif self.path.is_dir() and any(path.name != LOCK for path in self.path.iterdir()):
            if not holds_run:
                raise FileExistsError(f"output folder {self.path} isn't empty and holds no run of s2ft: choose another")
            if not overwrite:
                raise FileExistsError(
                    f"output folder {self.path} holds another run: resume it, overwrite it, or choose another"
                )

    @contextlib.contextmanager
    def reserved(self, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        """Check the folder and keep other processes' runs out of it. A folder that was made for this and is still
        empty at the end is removed.

        Raises:
            FileExistsError: As :meth:`check`, or another process runs in the folder; the message names it.
            FileNotFoundError: As :meth:`check`.
        """
        if not self.run.is_file():  # a folder of other files is not touched
            self.check(resume, overwrite)
        with only_run_in(self.path):
            self.check(resume, overwrite)
            yield

    def options(self) -> dict:
        """The options of the run that the folder holds. Raises: ValueError if its run.json can't be read."""
        options = read_json(self.run)
        if not isinstance(options, dict):
            raise ValueError(f"{self.run} holds no options of a run")
        return options

    def kept(self) -> str:
        """What a run that failed has left to go on from, in words."""
        if (self.adapter / CONFIG).is_file():
            return f"the trained adapter is saved in {self.adapter}"
        checkpoint = newest_valid(self.path)
        return (
            "no checkpoint was written, so the run starts again"
            if checkpoint is None
            else f"{checkpoint} is kept: go on from it with --resume"
        )

    def begin(self, options: dict, resume: bool = False) -> None:
        """Clear an earlier run away, or check that it is this one. Raises: ValueError naming what differs."""
        if resume:
            earlier = self.options()
            different = [
                key
                for key in options
                if key.split(".")[-1] not in NOT_PART_OF_A_RUN and earlier.get(key) != options[key]
            ]
            if different:
                raise ValueError(
                    f"the run in {self.path} was started with other options: "
                    + "; ".join(f"{key} was {earlier.get(key)!r}, is {options[key]!r}" for key in different)
                )
            return
        for path in (self.adapter, self.path / UNFINISHED, *checkpoints(self.path)):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.log, self.plot, self.report):
            path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run, options)


def log_failure(what: str, error: Exception) -> None:
    """Warn of something optional that failed; with --traceback also say where."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    logger.warning("warning: %s: %s", what, reason, exc_info=error if logger.isEnabledFor(logging.DEBUG) else None)


def write_json(path: Path, value: object) -> None:
    """Written beside and renamed, so that no reader meets half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl up to the first that is not one of its lines: an interrupt can cut the last one short."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                break
            lines.append(line)
    return lines
