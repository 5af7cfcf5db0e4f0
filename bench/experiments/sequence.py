"""Tasks in a row: a model learns one after the other, and after each all tasks so far are scored.

S²FT trains each task on top of the earlier ones, on units that none of them has trained (mode `on_top`). At the end
every state is restored from the saved adapters, and all weights are compared bit for bit with those of the model after
that task. The others train on what the task before has left: one adapter for all tasks (`continue`), or a new one that
is merged after each task (`merge`).
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import s2ft
from bench.experiments.any_method import arguments_of, merged, train
from bench.experiments.learning import SETTINGS as OF_LEARNING, Base, base_of, prepared_for
from bench.experiments.printing import Column, Table, summary
from bench.experiments.runner import ExperimentRun, Results, Stage, check_names, file_digest
from bench.experiments.tasks import TASKS, files_of
from s2ft.config import S2FTConfig
from s2ft.train.tuners import TUNERS, Prepared

KEYS = ("settings", "rows", "seeds", "tasks", "equal_to")
NEEDED = ("rows", "seeds", "tasks")
SETTINGS = OF_LEARNING
ROW = ("method", "options", "rate", "mode", "title")
MODES = ("on_top", "continue", "merge")
END = (
    Column("final", "average at the end", ".1f"),
    Column("backward_transfer", "backward transfer", ".1f"),
    Column("own_state", "average in own states", ".1f"),
    Column("forgetting", "forgetting (nats)", ".4f"),
    Column("kl", "KL (nats)", ".4f"),
    Column("restored", "restored states"),
)


def stages(experiment: dict[str, Any]) -> list[Stage]:
    """Check the experiment; there is a run for each row and seed."""
    found = runs(experiment)
    return [Stage(found)]


def runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs. Raises ValueError for a mode that does not go with its method, or for too few units."""
    settings, tasks = {**experiment["settings"], "tasks": experiment["tasks"]}, experiment["tasks"]
    check_names("tasks", tasks, TASKS)
    for name, row in experiment["rows"].items():
        _check(name, row, len(tasks))
    files = [file_digest(file) for task in tasks for file in files_of(task, settings)]
    return [
        ExperimentRun({"method": name, "seed": seed}, {**settings, "files": files, **row, "row": name, "seed": seed})
        for name, row in experiment["rows"].items()
        for seed in experiment["seeds"]
    ]


def _check(name: str, row: Mapping[str, Any], tasks: int) -> None:
    mode, method = row.get("mode"), row.get("method")
    check_names(f"row {name}, method", [method], TUNERS)
    if mode not in MODES:
        raise ValueError(f"row {name}: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "on_top" and method != "s2ft":
        raise ValueError(f"row {name}: mode on_top needs method s2ft, got {method!r}")
    if mode == "merge" and method == "full":
        raise ValueError(f"row {name}: full fine-tuning has no adapter to merge: take mode continue")
    config = S2FTConfig(**row["options"]) if mode == "on_top" else None
    largest = max(config.ratios.values(), default=0) if config and config.budget is None else 0
    if largest * tasks > 1:
        raise ValueError(
            f"row {name}: {tasks} tasks on disjoint units need ratios of at most {1 / tasks:.3g}, got {largest:g}"
        )


# ---- a run -----------------------------------------------------------------------------------------------


def measure(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train all tasks in a row, and score all tasks so far after each. Returns a row for each task."""
    base, rows = base_of(settings), []
    settings = {**settings, "task": settings["tasks"][0]}
    base.measure_base(settings)
    with tempfile.TemporaryDirectory() as place:
        learner = Learner(base, settings, Path(place))
        for number, name in enumerate(settings["tasks"], 1):
            model = learner.learn(name)
            known = {one: base.task(settings, one) for one in settings["tasks"][:number]}
            tests = {one: base.scores(model, task, settings) for one, task in known.items()}
            scores = {one: 100 * sum(found.values()) / len(found) for one, found in tests.items()}
            distance = base.distance(model, settings)
            forgetting = (
                {"forgetting": next(iter(distance.pop("forgetting").values()))} if "forgetting" in distance else {}
            )
            rows.append({"task": number, "after": name, "trained": learner.prepared.trainable, **scores,
                         "average": sum(scores.values()) / number, **forgetting, **distance})  # fmt: skip
        rows[-1] |= transfer([{name: row[name] for name in settings["tasks"] if name in row} for row in rows])
        if settings["mode"] == "on_top":
            rows[-1]["restored"] = learner.restore()
    return rows


def transfer(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Summarize the scores of tasks that were learned in a row.

    Args:
        scores: After each task, the scores of all tasks so far, by name and in their order.

    Returns:
        `final`, the mean over the tasks at the end; `backward_transfer`, the mean change of a task from the state after
        it to the end, over all tasks but the last; and `own_state`, the mean of each task in the state after it. A
        method that can restore every state can answer each task in that state.

    Example:
        >>> from bench.experiments.sequence import transfer
        >>> transfer([{"a": 80.0}, {"a": 70.0, "b": 90.0}])
        {'final': 80.0, 'backward_transfer': -10.0, 'own_state': 85.0}
    """
    names, last = list(scores[-1]), scores[-1]
    own = [scores[number][name] for number, name in enumerate(names)]
    changes = [last[name] - before for name, before in zip(names[:-1], own)]
    return {
        "final": sum(last.values()) / len(names),
        "backward_transfer": sum(changes) / max(1, len(changes)),
        "own_state": sum(own) / len(own),
    }


class Learner:
    """Trains tasks in a row.

    Args:
        base: The base, which stays as it is if it is small.
        settings: The settings of the run.
        folder: A folder for adapters and states.
    """

    def __init__(self, base: Base, settings: dict[str, Any], folder: Path) -> None:
        self.base, self.settings, self.folder = base, settings, folder
        self.model = base.copy()
        self.prepared: Prepared | None = None
        if settings["mode"] == "on_top":
            self._save("base")

    def learn(self, name: str) -> nn.Module:
        """Train a task. Returns the model that has learned it, in evaluation mode."""
        settings, mode = self.settings, self.settings["mode"]
        rows = self.base.rows(self.base.task(settings, name).train, settings)
        if self.prepared is None or mode != "continue":
            more = {"name": name, "on_top": True} if mode == "on_top" else {}
            self.prepared = prepared_for(self.base, self.model, rows, settings, **more)
        train(self.prepared, self.base.tokenizer, rows, arguments_of(settings, self.folder / name))
        if mode == "merge":
            self.model = merged(self.prepared)
        if mode == "on_top":
            s2ft.freeze_adapter(self.model)
            s2ft.save_adapter(self.model, self.folder / "adapters" / name, name)
            self._save(name)
        return (self.prepared.model if mode == "continue" else self.model).eval()

    def restore(self) -> str:
        """Load the saved adapters into the base, and switch to every state, the last one first.

        Raises:
            RuntimeError: A weight has other bits than after the task.
        """
        names, model = self.settings["tasks"], s2ft.detach(self.model)
        self._compare("base")
        for name in names:
            s2ft.load_adapter(model, self.folder / "adapters" / name, active=False)
        for count in range(len(names), 0, -1):
            s2ft.set_adapter(model, dict.fromkeys(names[:count], 1.0))
            self._compare(names[count - 1])
        s2ft.detach(model)
        self._compare("base")
        return f"{len(names)} of {len(names)}"

    def _save(self, state: str) -> None:
        found = {name: one.detach().contiguous().clone() for name, one in tensors_of(self.model).items()}
        save_file(found, self.folder / f"{state}.safetensors")

    def _compare(self, state: str) -> None:
        wrong = differing(tensors_of(self.model), load_file(self.folder / f"{state}.safetensors"))
        if wrong:
            raise RuntimeError(f"the state {state} is not restored: {len(wrong)} weights differ, such as {wrong[0]}")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that differ in a bit, or that only one side has. 0.0 differs from -0.0."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)

    wrong = [
        name
        for name in ours.keys() & theirs.keys()
        if (ours[name].dtype, ours[name].shape) != (theirs[name].dtype, theirs[name].shape)
        or not torch.equal(bits(ours[name]), bits(theirs[name]))
    ]
    return sorted([*wrong, *(ours.keys() ^ theirs.keys())])


# ---- tables ----------------------------------------------------------------------------------------------


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return the summary of each method, and the accuracies of all tasks after each task."""
    every, title = runs(experiment), experiment["title"]
    last = Results(results.file)
    last.lines = {digest: {**line, "rows": line.get("rows", [])[-1:]} for digest, line in results.lines.items()}
    notes = [
        "backward transfer: mean change of a task from the state after it to the end, in points",
        "own states: each task in the state right after it; only a method that restores its states can answer so",
    ]
    values = [Column("trained", "parameters of a task", ",d"), *END]
    by = [Column("method"), Column("task", "tasks"), Column("after")]
    scores = [Column(name, form=".1f") for name in (*experiment["tasks"], "average")]
    lost = [column for column in END if column.name in ("forgetting", "kl")]
    return [
        summary("results", title, every, last, by[:1], values, notes),
        summary("tasks", f"{title}: percent right after each task", every, results, by, [*scores, *lost]),
    ]
