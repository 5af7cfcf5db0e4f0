"""The output folder of a run: what stands where, and who may write into it."""
import json
import os
import shutil
from pathlib import Path

from s2ft.train.checkpoints import UNFINISHED, checkpoints
from s2ft.train.options import NOT_PART_OF_A_RUN

ADAPTER, LOG, PLOT, RUN, REPORT = "adapter", "log.jsonl", "loss.png", "run.json", "report.json"


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
        elif self.path.is_dir() and any(self.path.iterdir()):
            if not holds_run:
                raise FileExistsError(f"output folder {self.path} isn't empty and holds no run of s2ft: "
                                      "choose another")
            if not overwrite:
                raise FileExistsError(f"output folder {self.path} holds another run: resume it, overwrite it, "
                                      "or choose another")

    def begin(self, options: dict, resume: bool = False) -> None:
        """Clear an earlier run away, or check that it is this one. Raises: ValueError naming what differs."""
        if resume:
            earlier = json.loads(self.run.read_text(encoding="utf-8"))
            different = [key for key in options if key.split(".")[-1] not in NOT_PART_OF_A_RUN
                         and earlier.get(key) != options[key]]
            if different:
                raise ValueError(f"the run in {self.path} was started with other options: " + "; ".join(
                    f"{key} was {earlier.get(key)!r}, is {options[key]!r}" for key in different))
            return
        for path in (self.adapter, self.path / UNFINISHED, *checkpoints(self.path)):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.log, self.plot, self.report):
            path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run, options)


def write_json(path: Path, value: object) -> None:
    """Written beside and renamed, so that no reader meets half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def read_log(path: Path) -> list[dict]:
    """The lines of log.jsonl; a last line cut short by an interrupt is left out."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines
