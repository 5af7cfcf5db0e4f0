"""The output folder of a run: its files, its checkpoints, its report, and which process may write into it."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout  # PyTorch and huggingface_hub need it too

from s2ft.adapter.folders import STATE
from s2ft.files.plain_text import first_line, replace_file, sha256_of
from s2ft.files.reading import ADAPTER, CONFIG, OPTIONS, RUN, read_json

logger = logging.getLogger(__name__)
LOG, PLOT, REPORT = "log.jsonl", "loss.png", "report.json"
LOCK = ".lock"  # a file in the folder, which the process that writes a run holds locked
# Options in run.json: how many groups of devices train on different rows, and how many rows an update has. In another
# number of groups the same rows are divided in another way.
GROUPS, ROWS = "groups_of_devices", "training.batch_size"
DIVISION = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
CONTENTS = "contents"  # in run.json: the hashes of what the run reads, by these names
TRAINING_ROWS, HELD_OUT_ROWS = "training rows", "held-out rows"


class RunFolder:
    """The output folder of a run.

    It holds adapter/, checkpoint-N/, log.jsonl, loss.png, report.json, config.yaml (the options that the
    user has given) and run.json (all options that determine the result).

    Example:
        >>> from s2ft.train.output import RunFolder
        >>> folder = RunFolder("my-run")
        >>> folder.begin({"model": "my-model", "adapter.d_ratio": 0.03})
        >>> folder.options()["model"]
        'my-model'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.adapter, self.log, self.plot = self.path / ADAPTER, self.path / LOG, self.path / PLOT
        self.run, self.report, self.config = self.path / RUN, self.path / REPORT, self.path / OPTIONS

    def check(self, resume: bool = False, overwrite: bool = False) -> None:
        """Check that a run may use the folder. Nothing is changed.

        Args:
            resume: Whether the run continues the one in the folder.
            overwrite: Whether the run replaces the one in the folder.

        Raises:
            FileExistsError: The folder holds files that this run must not change.
            FileNotFoundError: There is no run to resume.
            ValueError: Both resume and overwrite are set.
        """
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
                    f"output folder {self.path} holds another run: --resume goes on with it, --overwrite "
                    "replaces it, or choose another folder"
                )

    @contextlib.contextmanager
    def reserved(self, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        """Check the folder and lock it against runs of other processes, inside the context.

        A folder that is created for this and is still empty at the end is removed.

        Args:
            resume: Whether the run continues the one in the folder.
            overwrite: Whether the run replaces the one in the folder.

        Raises:
            FileExistsError: As :meth:`check`, or another process runs in the folder.
            FileNotFoundError: As :meth:`check`.
        """
        if not self.run.is_file():  # The lock file is not written into a folder with other files.
            self.check(resume, overwrite)
        with only_run_in(self.path):
            self.check(resume, overwrite)
            yield

    def options(self) -> dict:
        """Return the options of the run in the folder. Raises ValueError if its run.json can't be read."""
        options = read_json(self.run)
        if not isinstance(options, dict):
            raise ValueError(f"{self.run} holds no options of a run")
        return options

    def kept(self) -> str:
        """Return a text about what a failed run has left to continue from."""
        if (self.adapter / CONFIG).is_file():
            return f"the trained adapter is saved in {self.adapter}"
        checkpoint = newest_valid(self.path)
        return (
            "no checkpoint was written, so the run starts again"
            if checkpoint is None
            else f"{checkpoint} is kept: go on from it with --resume"
        )

    def begin(
        self,
        options: dict,
        resume: bool = False,
        config: str | None = None,
        *,
        contents: Mapping[str, str] | None = None,
        may_change: Collection[str] = (),
    ) -> None:
        """Remove the files of an earlier run and write run.json, or check that the earlier run has the same options.

        Args:
            options: The options of this run that determine its result.
            resume: Whether this run continues the earlier one.
            config: The text of config.yaml, or None for a run that no config file can repeat.
            contents: The hashes of what this run reads, by what it is, such as "training rows".
            may_change: Names of contents that do not determine the result. If one has changed, a warning says so.

        Raises:
            ValueError: The earlier run has other options, or has read other contents. The message names them.
        """
        contents = dict(contents or {})
        if resume:
            earlier = self.options()
            self._check_contents(earlier.pop(CONTENTS, {}), contents, may_change)
            free = {GROUPS, *DIVISION} if earlier.get(GROUPS) != options.get(GROUPS) else set()
            names = [key for key in {**earlier, **options} if key not in free]
            different = [key for key in names if earlier.get(key) != options.get(key)]
            if different:
                raise ValueError(
                    f"the run in {self.path} was started with other options: "
                    + "; ".join(f"{key} was {earlier.get(key)!r}, is {options.get(key)!r}" for key in different)
                    + f". To train its adapter further, leave out --resume, and give --init-adapter {self.path} and "
                    "another --output"
                )
            return
        for path in (self.adapter, self.path / UNFINISHED, *checkpoints(self.path)):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.log, self.plot, self.report, self.config):
            path.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.run, {**options, CONTENTS: contents} if contents else options)
        if config is not None:
            replace_file(self.config, config.encode())

    def _check_contents(self, earlier: Mapping[str, str], now: Mapping[str, str], may_change: Collection[str]) -> None:
        """Raise ValueError if a run would go on with other rows. What one of both has not read is not compared."""
        for name in earlier.keys() & now.keys():
            if earlier[name] == now[name]:
                continue
            if name in may_change:
                logger.warning("warning: the %s have changed since the run in %s was started", name, self.path)
                continue
            raise ValueError(
                f"the {name} have changed since the run in {self.path} was started, so no run goes on with them: put "
                "the data back as it was, or start again with --overwrite. To train its adapter further on other "
                f"rows, leave out --resume, and give --init-adapter {self.path} and another --output"
            )


def log_failure(what: str, error: Exception) -> None:
    """Log a warning about an optional part that failed, with the traceback under --traceback."""
    logger.warning(
        "warning: %s: %s", what, first_line(error), exc_info=error if logger.isEnabledFor(logging.DEBUG) else None
    )


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file in one step, so that a reader never gets half a file."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_log(path: Path) -> list[dict]:
    """Return the lines of log.jsonl up to the first damaged one. An interrupt can cut off the last line."""
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


# ---- the lock ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the context.

    The folder is made if it does not exist, and removed if it is still empty at the end. The operating system releases
    the lock when the process ends for any reason. If files cannot be locked (on some network file systems), a warning
    is logged and nothing is locked.

    Args:
        folder: The output folder of a run.

    Raises:
        FileExistsError: Another process holds the lock.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.train.output import only_run_in
        >>> with only_run_in(Path("run")):
        ...     Path("run/report.json").write_text("{}")
        2
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0.2)  # not 0: it tries again where a holder has removed the file
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"output folder {folder} is in use: another process writes a run to it; wait until that run ends, or "
            "choose another folder"
        ) from None
    except (OSError, NotImplementedError):  # the file system does not support locks
        logger.warning(
            "files in %s can't be locked here: start no second run in this folder before this one ends", folder
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)  # before the release: who waits for it then opens a new file
        lock.release()
        for path in made:
            with contextlib.suppress(OSError):  # the folder is not empty
                path.rmdir()


# ---- the picture ---------------------------------------------------------------------------------------

CHARTS = {  # below each other, as far as they were measured
    "loss": ("loss", "eval_loss"),
    "learning rate": ("learning_rate",),
    "accuracy": ("eval_accuracy",),
    "nats": ("forgetting", "base_kl"),
}


def loss_figure(lines: list[dict], title: str = ""):
    """Draw the loss, the learning rate and the evaluations of a run as a matplotlib Figure.

    Args:
        lines: The lines, as :func:`s2ft.train.output.read_log` returns them.
        title: Text above the picture.
    """
    from matplotlib.figure import Figure

    series = {key: [(line["step"], line[key]) for line in lines if key in line] for key in sum(CHARTS.values(), ())}
    drawn = [name for name, keys in CHARTS.items() if any(series[key] for key in keys)] or ["loss"]
    figure = Figure(figsize=(8, 2 + 2 * len(drawn)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    charts = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for name, chart in zip(drawn, charts):
        for key in CHARTS[name]:
            if series[key]:
                chart.plot(*zip(*series[key]), marker="." if len(series[key]) <= 30 else None, label=key)
                chart.legend(frameon=False)
        chart.set_ylabel(name)
        chart.grid(alpha=0.3)
    charts[-1].set_xlabel("step")
    return figure


# ---- checkpoints that are complete or absent ---------------------------------------------------------
#
# A checkpoint is written to a temporary folder, sealed with the checksums of its files, and renamed.


CHECKPOINT = "checkpoint-"
UNFINISHED = ".unfinished"  # the temporary folder in which a checkpoint is written
SEAL = "s2ft_checkpoint.json"  # the sizes and checksums of all files; it is written last


def seal(checkpoint: Path) -> None:
    """Write the size and the SHA-256 of each file of a checkpoint to its seal."""
    files = {
        str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    replace_file(checkpoint / SEAL, json.dumps({"files": files}, indent=1).encode())


def damage(checkpoint: Path) -> str:
    """Describe what is wrong with a checkpoint.

    A checkpoint without a seal was written by a plain Trainer of transformers. Only its completeness is checked.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        A description of the first problem, or an empty string.
    """
    try:
        if not (checkpoint / SEAL).exists():
            json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            return ""
        files = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["files"]
        return next(
            (
                f"{name} was changed after it was written"
                for name, file in files.items()
                if (checkpoint / name).stat().st_size != file["bytes"] or sha256_of(checkpoint / name) != file["sha256"]
            ),
            "",
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a damaged file can contain anything
        return f"{SEAL if (checkpoint / SEAL).exists() else STATE} can't be read ({type(error).__name__})"


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, damaged ones too, oldest first."""
    found = [path for path in folder.glob(CHECKPOINT + "*") if path.name[len(CHECKPOINT) :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len(CHECKPOINT) :]))


def newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint in a folder, or None. Each newer one, which is damaged, is logged."""
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if not wrong:
            return path
        logger.warning("%s is damaged and is skipped: %s", path, wrong)
    return None


def ranks_of(checkpoint: Path) -> int:
    """Return the number of ranks that wrote a checkpoint, by their random states; 0 if it has none."""
    return len([*checkpoint.glob("rng_state.pth"), *checkpoint.glob("rng_state_*.pth")])


def best_checkpoint(state: Any, folder: Path | str) -> Path | None:
    """Where the best checkpoint of a trainer's state is. Its own path may spell the run's folder in another way."""
    recorded = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
    here = recorded and Path(folder) / recorded.name
    return here if here and here.is_dir() else recorded


def move_into_place(checkpoint: Path, folder: Path, keep: int, best: Path | None = None) -> None:
    """Seal a new checkpoint, move it from its temporary folder to `folder`, and delete the oldest checkpoints there.

    Args:
        checkpoint: The new checkpoint, in its temporary folder.
        folder: The folder that holds the run's checkpoints.
        keep: Number of checkpoints that stay, 0 for all. The new one and `best` always stay.
        best: The checkpoint with the best metric, or None.
    """
    seal(checkpoint)
    place = folder / checkpoint.name
    shutil.rmtree(place, ignore_errors=True)  # a damaged checkpoint, or one of an earlier attempt
    os.rename(checkpoint, place)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    found = sorted(checkpoints(folder), key=lambda one: one.stat().st_mtime)  # an earlier run may have made more steps
    removable = [path for path in found if path not in (place, best)]
    for old in removable[: len(found) - keep] if keep and len(found) > keep else []:
        shutil.rmtree(old, ignore_errors=True)
