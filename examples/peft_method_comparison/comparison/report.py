"""The table of all runs, and of the best learning rate of each method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison import results
from comparison.settings import Run
from s2ft.reproduce.tables import Column, Spread, Table

MEASURED = (
    Column("accuracy", "test accuracy %", ".1f"),
    Column("forgetting", "forgetting (nats)", ".3f"),
    Column("memory", "memory max (GB)", ".1f"),
    Column("memory_average", "average (GB)", ".1f"),
    Column("training", "training (s)", ".0f"),
    Column("time", "with test (s)", ".0f"),
    Column("tokens", "tokens/s", ".0f"),
    Column("trained", "trained (M)", ".2f"),
    Column("file", "file (MB)", ".1f"),
)
NOTES = (
    "memory: above what the process held before the model was loaded; on a GPU what PyTorch has reserved",
    "forgetting: rise of the loss on texts of an encyclopedia, in nats a token",
)


def row_of(content: dict[str, Any] | None) -> dict[str, Any] | str:
    """Return the numbers of a result, or in words why there are none.

    Args:
        content: The content of the result's file, or None.

    Returns:
        The numbers by column.
    """
    if content is None:
        return "not run"
    info, run = content["train_info"], content["run_info"]
    if info["status"] != results.SUCCESS:
        return run["error_msg"].partition(":")[0] or info["status"]
    last = info["metrics"][-1]
    return {
        "accuracy": 100 * last["test accuracy"],
        "forgetting": last["forgetting"],
        "memory": info["accelerator_memory_max"] / 1e9,
        "memory_average": info["accelerator_memory_reserved_avg"] / 1e9,
        "training": info["seconds"]["training"],
        "time": info["train_time"],
        "tokens": info["tokens_per_second"],
        "trained": info["num_trainable_params"] / 1e6,
        "file": info["file_size"] / 1e6,
    }


def tables(runs: Sequence[Run], output: Path) -> list[Table]:
    """Return the table of all runs, and that of each method at the rate with the best mean accuracy.

    The best rate is chosen on the validation problems, not on the test problems.

    Args:
        runs: The runs, also those without a result.
        output: Folder of the results.

    Returns:
        The two tables.
    """
    groups: dict[tuple[str, str, float], list[dict[str, Any] | None]] = {}
    for run in runs:
        key = (Path(run.params.model_id).name, run.name.split("/")[0], run.params.rate)
        groups.setdefault(key, []).append(results.read(output / run.file_name))
    by = [Column("model"), Column("method"), Column("rate", "learning rate")]
    every = [[*key, *_cells(contents)] for key, contents in groups.items()]
    best: dict[tuple[str, str], tuple[float, list]] = {}
    for (model, method, rate), contents in groups.items():
        score = _validated(contents)
        if score is not None and score > best.get((model, method), (-1.0, []))[0]:
            best[model, method] = (score, [model, method, rate, *_cells(contents)])
    return [
        Table("all", "All runs", [*by, *MEASURED], every, NOTES),
        Table(
            "best",
            "Each method at the learning rate with the best validation accuracy",
            [*by, *MEASURED],
            [row for _, row in best.values()],
            NOTES,
        ),
    ]


def _cells(contents: Sequence[dict[str, Any] | None]) -> list[Any]:
    rows = [row_of(content) for content in contents]
    numbers = [row for row in rows if isinstance(row, dict)]
    if not numbers:
        return [" / ".join(dict.fromkeys(map(str, rows))), *[None] * (len(MEASURED) - 1)]
    return [Spread.of([row[column.name] for row in numbers]) for column in MEASURED]


def _validated(contents: Sequence[dict[str, Any] | None]) -> float | None:
    """Mean validation accuracy of the last quarter of the validations, or None if a run has none."""
    scores = []
    for content in contents:
        found = [
            one["valid accuracy"]
            for one in (content or {}).get("train_info", {}).get("metrics", [])
            if "valid accuracy" in one
        ]
        if not found:
            return None
        last = found[-max(1, len(found) // 4) :]
        scores.append(sum(last) / len(last))
    return sum(scores) / len(scores)
