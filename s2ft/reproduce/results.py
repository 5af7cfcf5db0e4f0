"""The results of an experiment: a JSON file for each run, with its configuration, versions and machine."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import s2ft
from s2ft.train.output import write_json

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "safetensors")
DONE, FAILED, MISSING = "done", "failed", "missing"


@dataclass(frozen=True)
class Run:
    """One run of an experiment and what it measured.

    Attributes:
        recipe: Name of the recipe.
        labels: Short words that tell the runs apart, such as method and seed.
        configuration: Everything that determines the result.
        status: "done", "failed", or "missing" for a run that was not made yet.
        rows: What it measured: numbers by name.
        error: The error of a failed run.
        seconds: Duration of the run.
        date: When it began, in UTC.
        command: The command line.
        versions: Versions of s2ft, Python and the packages.
        machine: The processor, the memory, the devices and the number of threads.
    """

    recipe: str
    labels: dict[str, Any]
    configuration: dict[str, Any]
    status: str = MISSING
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float | None = None
    date: str | None = None
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The first 12 digits of the SHA-256 of the configuration."""
        return digest(self.configuration)[:12]

    @property
    def name(self) -> str:
        """The labels as text, such as "s2ft seed 0"."""
        return name_of(self.labels)


def name_of(labels: Mapping[str, Any]) -> str:
    """Return labels as text: a word stands alone, a number stands behind its name.

    Example:
        >>> from s2ft.reproduce.results import name_of
        >>> name_of({"method": "lora", "seed": 0})
        'lora seed 0'
    """
    return " ".join(f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in labels.items())


def digest(configuration: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a configuration in JSON, in hexadecimal digits. The order of the keys does not matter.

    Example:
        >>> from s2ft.reproduce.results import digest
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    text = json.dumps(configuration, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest_of(file)


def _digest_of(file) -> str:
    found = hashlib.sha256()
    while piece := file.read(2**20):
        found.update(piece)
    return found.hexdigest()


class Results:
    """The folder of an experiment's results.

    Args:
        folder: The output folder. Each run has a folder `runs/NAME-ID`, with `run.json` and the files of the run.

    Example:
        >>> from s2ft.reproduce.results import Results, Run
        >>> results = Results("results")
        >>> run = Run("mine", {"method": "lora", "seed": 0}, {"method": "lora", "seed": 0}, "done", [{"accuracy": 0.5}])
        >>> results.save(run)
        >>> results.find({"seed": 0, "method": "lora"}).rows
        [{'accuracy': 0.5}]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def folder_of(self, run: Run) -> Path:
        """Return the folder of a run's files."""
        words = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in run.name)
        return self.folder / "runs" / f"{words[:60]}-{run.id}"

    def save(self, run: Run) -> None:
        """Write the JSON of a run."""
        folder = self.folder_of(run)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"id": run.id, **asdict(run)})

    def all(self) -> list[Run]:
        """Return the runs in the folder, in the order of their dates.

        Raises:
            ValueError: A file can't be read.
        """
        found = [self._read(file) for file in (self.folder / "runs").glob("*/run.json")]
        return sorted(found, key=lambda run: (run.date or "", run.name))

    def find(self, configuration: Mapping[str, Any]) -> Run | None:
        """Return the run of a configuration, or None."""
        wanted = digest(configuration)[:12]
        files = sorted((self.folder / "runs").glob(f"*-{wanted}/run.json"))
        return self._read(files[0]) if files else None

    @staticmethod
    def _read(file: Path) -> Run:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return Run(**{one.name: found[one.name] for one in fields(Run) if one.name in found})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} can't be read: {error}; delete it, and the run is made again") from error


def same_id(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs whose configuration another run has too."""
    ids = [run.id for run in runs]
    return [run.name for place, run in enumerate(runs) if run.id in ids[:place]]


# ---- where a run was made ------------------------------------------------------------------------------


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601 writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of s2ft, Python, CUDA and the packages that are installed.

    Example:
        >>> from s2ft.reproduce.results import versions
        >>> versions()["s2ft"] == s2ft.__version__
        True
    """
    found = {"s2ft": s2ft.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine() -> dict[str, Any]:
    """Return what is known of the machine, without its name.

    Returns:
        The system, the processor, the number of its cores that this process may use, the threads of PyTorch, the
        memory in bytes, whether s2ft's kernels are compiled, and the GPUs with their memory in bytes.

    Example:
        >>> from s2ft.reproduce.results import machine
        >>> machine()["cores"] >= 1
        True
    """
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "compiled_kernels": bool(s2ft.build_info()["compiled"]),
        "gpus": [],
    }
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found["gpus"].append({"name": properties.name, "memory_bytes": properties.total_memory})
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
