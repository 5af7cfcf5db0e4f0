"""The same comparison over models × methods × learning rates × seeds: one process a run, and a table of all runs."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison import results
from comparison.settings import Run, training_params
from s2ft.files.writing import replace_file
from s2ft.reproduce.methods import METHODS, matched, prepare
from s2ft.text.models import hollow_model

logger = logging.getLogger(__name__)

VARIANTS = Path(__file__).parents[1] / "suite.json"
RANK = 32  # the size of all methods is that of LoRA of this rank on q_proj and v_proj, as PEFT's comparison has it
LEAST = 60.0  # seconds; with less time no run is started
ENDING = 5.0  # seconds between the end that a run is told and that at which its process is ended


@dataclass(frozen=True)
class Limits:
    """How a suite is run.

    Attributes:
        output: Folder of the results.
        data: Folder with the data; None reads from the hub.
        test_rows: Number of test problems; None takes all.
        until: When the suite must end, as `time.time()`; None for no limit.
        isolated: Whether each run has a process of its own.
    """

    output: Path
    data: Path | None = None
    test_rows: int | None = None
    until: float | None = None
    isolated: bool = True


def read_variants(file: Path) -> dict[str, dict[str, Any]]:
    """Read what a suite compares.

    Args:
        file: JSON: by name a `method` of `s2ft.reproduce.methods`, its `options` and its learning `rates`.

    Returns:
        The variants by name.

    Raises:
        ValueError: A variant has no rates, an unknown method or an unknown key.
    """
    variants = json.loads(file.read_text(encoding="utf-8"))
    for name, one in variants.items():
        unknown = sorted(set(one) - {"method", "options", "rates"})
        if unknown or "/" in name:
            raise ValueError(f"{file.name}: {name} must have method, options and rates, and no / in its name")
        if one.get("method") not in METHODS:
            raise ValueError(
                f"{file.name}: method of {name} must be one of {', '.join(METHODS)}, got {one.get('method')!r}"
            )
        if not one.get("rates"):
            raise ValueError(f"{file.name}: {name} must have at least one learning rate in rates")
    return variants


def runs_of(
    models: Sequence[str],
    variants: dict[str, dict[str, Any]],
    rates: Sequence[float] | None,
    seeds: Sequence[int],
    parameters: int | None,
    changes: dict[str, Any],
) -> list[Run]:
    """Return all runs of a suite. The runs of one model follow each other, and those of the first seed come first.

    Args:
        models: Names on the hub, or folders.
        variants: What is compared, see :func:`read_variants`.
        rates: Learning rates of all variants; None takes their own.
        seeds: Seeds.
        parameters: Largest number of trained parameters of every method but full fine-tuning. None takes that of LoRA
            with rank 32 on q_proj and v_proj.
        changes: Training parameters that differ from the defaults.

    Returns:
        The runs.

    Raises:
        ValueError: A method can't be so small, or a parameter is not allowed.
    """
    runs = []
    for model_id in models:
        hollow = hollow_model(model_id)
        size = parameters or _default_size(model_id)
        for seed in seeds:
            for name, one in variants.items():
                options = dict(one.get("options", {}))
                if one["method"] != "full":
                    options = matched(hollow, one["method"], size, options)
                    options = {
                        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()
                    }
                for rate in rates or one["rates"]:
                    optimizer = {"lr": rate, "weight_decay": changes.get("weight_decay", 0.1)}
                    own = {"model_id": model_id, "seed": seed, "optimizer_kwargs": optimizer}
                    rest = {key: value for key, value in changes.items() if key != "weight_decay"}
                    title = f"{name}/{Path(model_id).name}-lr_{rate:g}-seed_{seed}"
                    runs.append(Run(title, training_params({**rest, **own}), None, one["method"], options))
    return runs


def _default_size(model_id: str) -> int:
    """Number of parameters of LoRA with rank 32 on q_proj and v_proj."""
    return prepare(hollow_model(model_id), "lora", {"r": RANK, "target_modules": ["q_proj", "v_proj"]}).trainable


def execute_all(runs: Sequence[Run], limits: Limits, show: Callable[[], None] = lambda: None) -> bool:
    """Run what has no result yet, until the time limit.

    A run that does not fit into memory, or whose loss is no number, has a result that says so. A run that fails
    otherwise has one too, and is repeated by the next call. The other runs go on.

    Args:
        runs: The runs.
        limits: Folders and limits.
        show: Called after each run.

    Returns:
        Whether all runs are done.
    """
    complete = True
    for run in runs:
        if results.is_done(results.read(limits.output / run.file_name)):
            continue
        if limits.until is not None and limits.until - time.time() < LEAST:
            logger.info("time limit: %s and what follows is left for the next call", run.name)
            return False
        logger.info("running %s", run.name)
        content = (_in_process if limits.isolated else _here)(run, limits)
        complete &= results.is_done(content)
        show()
    return complete


def _here(run: Run, limits: Limits) -> dict[str, Any] | None:
    from comparison.running import execute

    return execute(run, limits.output, limits.data, limits.until, limits.test_rows)


def _in_process(run: Run, limits: Limits) -> dict[str, Any] | None:
    """Run in a process of its own, so that its memory is measured alone, and is free afterwards."""
    work = limits.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    spec, path, log = work / f"{run.name.replace('/', '--')}.json", limits.output / run.file_name, work / "log.txt"
    replace_file(spec, json.dumps(run.to_dict()).encode())
    command = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "--run", str(spec)]
    command += ["--output", str(limits.output), *(["--data", str(limits.data)] if limits.data else [])]
    command += ["--test-rows", str(limits.test_rows)] if limits.test_rows else []
    left = None if limits.until is None else limits.until - time.time()
    command += ["--until", str(limits.until - ENDING)] if left is not None else []
    created = results.now()
    path.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=output, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            logger.info("%s did not stop before the time limit, and was ended", run.name)
            return None
    spec.unlink()
    content = results.read(path)
    if content is None and code != 0:
        reason = f"the process ended with code {code}" if code > 0 else f"the process was ended by signal {-code}"
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        error = f"{reason}: {lines[-1] if lines else 'no output'}"
        logger.error("%s: %s", run.name, error)
        content = results.result(run, created, results.FAILED, {"metrics": []}, error)
        results.write(path, content)
    return content


def has_failed(run: Run, output: Path) -> bool:
    """Whether the last attempt of a run failed."""
    content = results.read(output / run.file_name)
    return content is not None and not results.is_done(content)
