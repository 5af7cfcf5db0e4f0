"""Train methods on tasks, and measure what they learn, forget and cost. The evidence and the paper's accuracies.

Stages: (1) the base, and every row at each of its rates, on each task with each seed; (2) time and memory of a few
updates, if `costs` is set, one run at a time on all cores. `rates` of a row may be a list for each task. A row with
`longer` makes so many times the updates, for methods whose updates take less time.

With `scales` each run gives a curve: its delta times each scale, with losses and forgetting. `answer_within` is a limit
of forgetting: the test questions are answered at the point of the curve with the lowest validation loss within it.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import s2ft
from bench.experiments.any_method import arguments_of, evaluating, merged, train, train_in_phases
from bench.experiments.learning import SETTINGS as OF_LEARNING, Base, base_of, prepared_for
from bench.experiments.matched_methods import trained_parameters
from bench.experiments.memory import PeakMemory, return_freed_memory
from bench.experiments.runner import ExperimentRun, Stage, check_names, file_digest
from bench.experiments.selections import CANDIDATES
from bench.experiments.tasks import TASKS, Task, files_of
from bench.experiments.trials import TRIALS
from s2ft.text.divergence import mean_loss
from s2ft.text.models import hollow_model
from s2ft.train.demo import default_model
from s2ft.train.tuners import TUNERS, Prepared, TrainedRun

BASE = "base"  # the row of the model without training
COSTS = "costs"  # the task of runs that measure time and memory
ROUNDS = 2  # of each row
BASE_TOKENS = 160  # the least that the base may write: it writes long answers before it comes to the number
OF_A_ROW = ("method", "options", "parameters", "phases", "protect", "trial")  # what a run's numbers depend on
# The keys of a recipe, those that it must have, those of its settings, and those of a row
KEYS = ("settings", "rows", "seeds", "tasks", "steps", "rates", COSTS, "base", "equal_to")
NEEDED = ("rows", "seeds", "tasks")
SETTINGS = (*OF_LEARNING, "best", "save", "train", "tests", "answers", "scales", "answer_within")
ROW = (*OF_A_ROW, "title", "rates", "tasks", "longer")


# ---- the plan --------------------------------------------------------------------------------------------


def run_of(experiment: dict[str, Any], row: str, task: str, rate: float, seed: int) -> ExperimentRun:
    """Return a run of a row, with everything that its numbers depend on."""
    entry = {"method": BASE} if row == BASE else experiment["rows"][row]
    settings = {**experiment["settings"], **{key: entry[key] for key in OF_A_ROW if key in entry}}
    settings |= {"task": experiment["tasks"][0] if task == COSTS else task, "rate": rate, "seed": seed}
    if task == COSTS:
        settings[COSTS] = True
    if task in experiment.get("steps", {}):
        longer = 1 if task == COSTS else entry.get("longer", 1)
        settings["training"] = {**settings["training"], "max_steps": round(experiment["steps"][task] * longer)}
    files = files_of(settings["task"], settings)
    if files:
        settings["files"] = list(map(file_digest, files))
    return ExperimentRun({"row": row, "task": task, "rate": rate, "seed": seed}, settings)


def rates_of(experiment: dict[str, Any], row: str, task: str) -> list[float]:
    """Return the learning rates of a row on a task: its own, or those of the experiment. Empty if it skips the task."""
    entry = experiment["rows"][row]
    if task not in entry.get("tasks", experiment["tasks"]):
        return []
    rates = entry.get("rates", experiment.get("rates", []))
    return list(map(float, rates.get(task, []) if isinstance(rates, dict) else rates))


def training_runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs that train and are scored, seed after seed."""
    return [
        run_of(experiment, row, task, rate, seed)
        for seed in experiment["seeds"]
        for task in experiment["tasks"]
        for row in experiment["rows"]
        for rate in rates_of(experiment, row, task)
    ]


def base_runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs that score the base, if the experiment wants them."""
    tasks = experiment["tasks"] if experiment.get("base") else ()
    return [run_of(experiment, BASE, task, 0.0, experiment["seeds"][0]) for task in tasks]


def cost_runs(experiment: dict[str, Any], rows: Sequence[str] | None = None) -> list[ExperimentRun]:
    """Return the runs that measure time and memory, if the experiment wants them."""
    rows = experiment["rows"] if rows is None else rows
    rounds = range(ROUNDS if experiment.get(COSTS) else 0)
    return [run_of(experiment, row, COSTS, 1e-4, number) for number in rounds for row in rows]


def stages(experiment: dict[str, Any]) -> list[Stage]:
    """Check the experiment and return its stages. What would fail hours later fails here."""
    settings = experiment["settings"]
    check_names("tasks", experiment["tasks"], TASKS)
    for task in experiment["tasks"]:
        files_of(task, settings)
    if settings.get("best") and not settings["questions"].get("validation"):
        raise ValueError("best needs held-out rows: set questions.validation")
    if settings.get("scales") and not (settings.get("probes") and settings["questions"].get("validation")):
        raise ValueError("scales need forgetting and a validation loss: set probes and questions.validation")
    if "answer_within" in settings and not settings.get("scales"):
        raise ValueError("answer_within needs scales")
    hollow = hollow_model(settings["model"] or default_model())
    for name, row in experiment["rows"].items():
        check_names(f"row {name}, method", [row.get("method")], TUNERS)
        check_names(f"row {name}, trial", row.get("trial", {}), TRIALS)
        options = {key: value for key, value in row.get("options", {}).items() if str(value) not in CANDIDATES}
        try:
            trained_parameters(hollow, row["method"], options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"row {name}: {error}") from error
        for task in row.get("tasks", experiment["tasks"]):
            rates = rates_of(experiment, name, task)
            if not rates or any(rate <= 0 for rate in rates):
                raise ValueError(f"row {name}: rates must be positive on {task}, got {row.get('rates')!r}")
    return [Stage([*base_runs(experiment), *training_runs(experiment)]), Stage(cost_runs(experiment), alone=True)]


# ---- a run -----------------------------------------------------------------------------------------------


def measure(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train and measure a run.

    Args:
        settings: Its settings.
        folder: The folder for its files.

    Returns:
        One row: accuracies as shares, losses in nats a token, times in seconds, memory in bytes.
    """
    base = base_of(settings)
    task, scored, dtype = base.task(settings), COSTS not in settings, base.model.dtype
    if scored:
        base.measure_base(settings)
    if settings["method"] == BASE:
        untrained = Prepared(base.model, base.model, BASE, {}, 0)
        longer = replace(task, max_new_tokens=max(task.max_new_tokens, BASE_TOKENS))
        return [_scores(base, untrained, longer, settings, folder)]
    rows = base.rows(task.train, settings)
    held_out = base.rows(task.validation, settings) if settings.get("best") else None
    return_freed_memory()
    memory = PeakMemory(base.model.device.type)
    memory.forget_peak()
    model = base.copy()
    with tempfile.TemporaryDirectory() as place:
        arguments = arguments_of(settings, place)
        if "phases" in settings:
            config = s2ft.S2FTConfig(
                **settings["options"], budget=settings["parameters"] // settings["phases"], seed=settings["seed"]
            )
            how = (settings["phases"], settings["calibration"])
            prepared, trained = train_in_phases(model, base.tokenizer, rows, arguments, config, *how)
        else:
            prepared = prepared_for(base, model, rows, settings)
            texts = base.batches(base.texts("protected", 24), 2) if "trial" in settings else ()
            callbacks = [TRIALS[name](model, value, texts) for name, value in settings.get("trial", {}).items()]
            how = {"held_out": held_out, "best": bool(settings.get("best")), "callbacks": callbacks}
            trained = train(prepared, base.tokenizer, rows, arguments, **how)
    peak = memory.peak()
    if settings["method"] == "full":
        model.to(dtype)
    if settings.get("save"):
        _save(prepared, base, folder / "adapter")
    row: dict[str, Any] = {}
    if scored:
        row = (
            _scaled(base, prepared, task, settings)
            if settings.get("scales")
            else _scores(base, prepared, task, settings, folder)
        )
    known = {one.question.strip() for one in task.train}
    asked = [one.question.strip() for ones in task.tests.values() for one in ones]
    return [{**row, **_of_training(prepared, trained, peak), "trained_on_tests": sum(one in known for one in asked)}]


def _scores(base: Base, prepared: Prepared, task: Task, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure accuracy, loss, forgetting and divergence of the model as it was trained: adapters are not merged."""
    found: dict[str, Any] = {}
    with evaluating(prepared) as model:
        if task.validation and task.right:
            found["validation"] = base.accuracy(model, task, task.validation, settings)
        if task.validation:
            found["loss"] = mean_loss(model, base.rows(task.validation, settings))
        found["tests"] = base.scores(model, task, settings, folder / "answers" if settings.get("save") else None)
        found |= base.distance(model, settings)
    return found


@torch.no_grad()
def _scaled(base: Base, prepared: Prepared, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the base, and the trained delta times each of `scales`: the losses of the answers, and the forgetting.

    With `answer_within` the test questions are answered too, at the scale of :func:`best_within`.
    """
    found = [{"scale": 0.0, "forgetting": 0.0, **base.base_losses(settings)}]
    model, start = merged(prepared).eval(), dict(base_of(settings).model.named_parameters())
    trained = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def scale_by(scale: float) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(start[name].lerp(trained[name], scale))

    for scale in settings["scales"]:
        scale_by(scale)
        forgetting = next(iter(base.distance(model, settings)["forgetting"].values()))
        found.append({"scale": scale, "forgetting": forgetting, **base.losses(model, task, settings)})
    if "answer_within" not in settings:
        return {"scaled": found}
    *_, scale = best_within(found, settings["answer_within"])
    scale_by(scale)
    return {"scaled": found, "answered_at": scale, "tests": base.scores(model, task, settings)}


def best_within(curve: list[dict[str, float]], limit: float) -> tuple[float, float, float]:
    """Return where a curve has the lowest validation loss up to a limit of forgetting.

    Lines join its points in the order of their scales. Where losses fall ever more slowly, a line overstates them.

    Args:
        curve: Points with forgetting, losses of validation and test questions in nats a token, and scale.
        limit: Largest forgetting in nats a token.

    Returns:
        The validation loss, the test loss and the scale there.
    """
    points = [(one["forgetting"], one["validation"], one["test"], one["scale"]) for one in curve]
    within = [tuple(values) for forgetting, *values in points if forgetting <= limit]
    for (x, *values), (next_x, *next_values) in pairwise(points):
        if (x <= limit) != (next_x <= limit):
            share = (limit - x) / (next_x - x)
            within.append(tuple(one + (other - one) * share for one, other in zip(values, next_values)))
    return min(within)


def _of_training(prepared: Prepared, trained: TrainedRun, peak: int) -> dict[str, Any]:
    return {
        "trainable": prepared.trainable,
        "options": {key: value for key, value in prepared.options.items() if key != "units"},
        "losses": trained.losses,
        "seconds_per_step": trained.seconds_per_step,
        "tokens_per_second": trained.tokens_per_second,
        "peak_bytes": peak,
        **({} if trained.best_step is None else {"best_step": trained.best_step}),
    }


def _save(prepared: Prepared, base: Base, folder: Path) -> None:
    """Save the adapter of a method. Full fine-tuning has none."""
    if prepared.method == "s2ft":
        s2ft.attached.saving.add_info(prepared.model, {"prompt": base.prompt.to_dict()})
        s2ft.save_adapter(prepared.model, folder)
    elif prepared.method != "full":
        prepared.model.save_pretrained(folder)
