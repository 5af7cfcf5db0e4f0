"""The result of a run, in the form of the files in PEFT's `method_comparison/MetaMathQA/results`."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from comparison.settings import Run
from s2ft.files.writing import replace_file

SUCCESS, CANCELED, FAILED = "success", "canceled", "failed"
OUT_OF_MEMORY = "out of memory"  # begins the error message of such a run
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "s2ft")


def now() -> str:
    """The time, as PEFT writes it."""
    return datetime.datetime.now(tz=datetime.timezone.utc).replace(microsecond=0).isoformat()


def result(run: Run, created: str, status: str, train_info: dict[str, Any], error: str = "") -> dict[str, Any]:
    """Return the content of a result's file.

    Args:
        run: The run.
        created: When it was started.
        status: "success", "canceled" or "failed".
        train_info: What was measured.
        error: What went wrong.

    Returns:
        The content.
    """
    adapter = run.adapter
    if adapter is None and run.method != "full":
        adapter = {"peft_type": run.method.upper(), **run.options}
    return {
        "run_info": {
            "created_at": created,
            "total_time": train_info.pop("total_time", None),
            "experiment_name": run.name,
            "peft_branch": f"s2ft {_version('s2ft')}",
            "train_config": dataclasses.asdict(run.params),
            "peft_config": adapter,
            "error_msg": error,
        },
        "train_info": {**train_info, "status": status},
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": train_info.pop("dataset_info", {}),
            "package_info": {f"{name}-version": _version(name) for name in PACKAGES},
            "system_info": {
                "system": platform.system(),
                "release": platform.release(),
                "machine": platform.machine(),
                "processor": platform.processor(),
                "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def read(path: Path) -> dict[str, Any] | None:
    """Return a result's content, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_done(content: dict[str, Any] | None) -> bool:
    """Whether a run needs no repetition: it succeeded, does not fit into memory, or its loss is no number."""
    return content is not None and content["train_info"]["status"] in (SUCCESS, CANCELED)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
