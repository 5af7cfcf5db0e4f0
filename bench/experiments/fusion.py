"""Two tasks in one model by a weighted sum of two adapters (S²FT paper, section 5.4).

Each adapter is trained alone on the base. The two of S²FT train the same units (`overlapping`) or have none in common
(`disjoint`). Those of LoRA are added as products, so that the sum is exact.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import s2ft
from bench.experiments.any_method import arguments_of, train
from bench.experiments.learning import SETTINGS as OF_LEARNING, Base, base_of, prepared_for
from bench.experiments.printing import Column, Table, summary
from bench.experiments.runner import ExperimentRun, Results, Stage, check_names, file_digest
from bench.experiments.tasks import TASKS, files_of
from s2ft.adapter.adapter import overlap
from s2ft.packages import check_packages

KEYS = ("settings", "rows", "seeds", "tasks", "base", "weights")
NEEDED = ("rows", "seeds", "tasks", "weights")
SETTINGS = OF_LEARNING
ROW = ("method", "options", "rates", "units", "title")
BASE = "base"
UNITS = ("disjoint", "overlapping")  # of the second adapter of S²FT, seen from the first
Sums = Iterator[tuple[Sequence[float], Any, dict[str, Any]]]


def stages(experiment: dict[str, Any]) -> list[Stage]:
    """Check the experiment; there is a run for each row and seed, and one for the base."""
    tasks, weights = experiment["tasks"], experiment["weights"]
    check_names("tasks", tasks, TASKS)
    if len(tasks) != 2:
        raise ValueError(f"tasks must be two, got {', '.join(tasks)}")
    if not all(len(pair) == 2 and 0 not in pair for pair in weights):
        raise ValueError(f"weights must be pairs without 0, since each adapter alone is scored anyway, got {weights!r}")
    for name, row in experiment["rows"].items():
        if set(row.get("rates", ())) != set(tasks):
            raise ValueError(f"row {name}: rates must have a rate for {' and '.join(tasks)}, got {row.get('rates')!r}")
        if row["method"] not in ("s2ft", "lora") or (row["method"] == "s2ft" and row.get("units") not in UNITS):
            raise ValueError(f"row {name}: must be of lora, or of s2ft with units {' or '.join(UNITS)}, got {row!r}")
        if row["method"] == "lora":
            check_packages("s2ft.peft", "leave out the row of lora")
    found = runs(experiment)
    return [Stage(found)]


def runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs."""
    shared = {**experiment["settings"], "tasks": experiment["tasks"]}
    shared["files"] = [file_digest(file) for task in experiment["tasks"] for file in files_of(task, shared)]
    first = experiment["seeds"][0]
    found = (
        [ExperimentRun({"pair": BASE, "seed": first}, {**shared, "row": BASE, "seed": first})]
        if experiment.get("base")
        else []
    )
    for name, row in experiment["rows"].items():
        known = {**shared, **row, "row": name, "weights": experiment["weights"]}
        found += [ExperimentRun({"pair": name, "seed": seed}, {**known, "seed": seed}) for seed in experiment["seeds"]]
    return found


def measure(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train the two adapters of a pair, and score each alone and both in every weighted sum: a row for each."""
    base = base_of(settings)
    tasks = {name: base.task(settings, name) for name in settings["tasks"]}

    def scores(model: Any) -> dict[str, float]:
        found = {name: base.scores(model, task, settings) for name, task in tasks.items()}
        means = {name: 100 * sum(one.values()) / len(one) for name, one in found.items()}
        return {**means, "average": sum(means.values()) / len(means)}

    if settings["row"] == BASE:
        return [{"weights": "0, 0", **scores(base.model)}]
    sums = [(1.0, 0.0), (0.0, 1.0), *settings["weights"]]
    pair = _lora_pair if settings["method"] == "lora" else _s2ft_pair
    with tempfile.TemporaryDirectory() as place:
        return [
            {"weights": ", ".join(f"{weight:g}" for weight in weights), **found, **scores(model)}
            for weights, model, found in pair(base, settings, sums, Path(place))
        ]


def _trained(base: Base, model: Any, settings: dict[str, Any], task: str, folder: Path, **more: Any) -> Any:
    """Train an adapter of a task."""
    rows = base.rows(base.task(settings, task).train, settings)
    prepared = prepared_for(base, model, rows, settings, **more)
    train(prepared, base.tokenizer, rows, arguments_of({**settings, "rate": settings["rates"][task]}, folder / "log"))
    prepared.model.eval()
    return prepared


def _s2ft_pair(base: Base, settings: dict[str, Any], sums: Sequence[Sequence[float]], folder: Path) -> Sums:
    """Train two adapters of S²FT, and yield the model with each weighted sum."""
    model, adapters, trained = base.copy(), [], 0
    for name in settings["tasks"]:
        options = dict(settings["options"])
        if adapters and settings["units"] == "disjoint":
            options["exclude"] = adapters[0].selection
        elif adapters:  # the units of the first
            options = {"d_ratio": 0.0, "units": adapters[0].selection.to_dict()}
        trained = _trained(base, model, {**settings, "options": options}, name, folder, name=name).trainable
        adapters.append(s2ft.get_adapter(model, name))
        s2ft.detach(model)
    shared = overlap(adapters)
    if settings["units"] == "disjoint" and shared.units:
        raise RuntimeError(f"the adapters should have no unit in common, and share {shared.units}")
    for adapter in adapters:
        s2ft.load_adapter(model, adapter, active=False)
    for weights in sums:
        s2ft.set_adapter(model, dict(zip(settings["tasks"], map(float, weights))))
        yield weights, model, {"trained": trained, "shared": round(100 * shared.share, 2)}


def _lora_pair(base: Base, settings: dict[str, Any], sums: Sequence[Sequence[float]], folder: Path) -> Sums:
    """Train two LoRAs, and yield the model with each weighted sum of their products."""
    from peft import PeftModel

    plain, (first, second), trained = base.copy(), settings["tasks"], 0
    for name in (first, second):
        prepared = _trained(base, plain, settings, name, folder)
        prepared.model.save_pretrained(folder / name)
        plain, trained = prepared.model.unload(), prepared.trainable
    model = PeftModel.from_pretrained(plain, folder / first, adapter_name=first)
    model.load_adapter(folder / second, second)
    for number, weights in enumerate(sums):
        if 0.0 in weights:
            model.set_adapter(first if weights[0] else second)
        else:  # "cat" gives exactly the weighted sum of the two products
            model.add_weighted_adapter([first, second], list(weights), f"sum{number}", combination_type="cat")
            model.set_adapter(f"sum{number}")
        yield weights, model.eval(), {"trained": trained}


# ---- tables ----------------------------------------------------------------------------------------------


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return the accuracies by pair and weights."""
    first, second = experiment["tasks"]
    by = [Column("pair"), Column("weights", f"weights ({first}, {second})")]
    values = [Column("trained", "parameters of each", ",d"), Column("shared", "shared units %", ".1f")]
    values += [Column(name, form=".1f") for name in (first, second, "average")]
    notes = ["percent right of generated answers"]
    return [summary("results", experiment["title"], runs(experiment), results, by, values, notes)]
