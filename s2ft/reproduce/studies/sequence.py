"""Tasks in a row: a model learns one after the other, and after each all tasks so far are scored.

S²FT trains each task on top of the earlier ones, on units that none of them has trained. At the end every state is
restored from the saved adapters, and all weights are compared bit for bit with those of the model after that task. The
others train on what the task before has left: one adapter for all tasks (`continue`), or a new one that is merged after
each task (`merge`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import s2ft
from s2ft.config import S2FTConfig
from s2ft.reproduce.data import TrialData, find_file, text_rows
from s2ft.reproduce.figures import Figure, Series
from s2ft.reproduce.kind import Kind, Planned
from s2ft.reproduce.methods import Prepared, prepare
from s2ft.reproduce.recipe import Recipe, check_keys
from s2ft.reproduce.results import DONE, Run, file_digest
from s2ft.reproduce.smoke import smoke_data, smoke_model
from s2ft.reproduce.states import differing, save_state
from s2ft.reproduce.tables import Column, Spread, Table, summary
from s2ft.reproduce.tasks import TaskOptions, load_tests, score, task_data
from s2ft.reproduce.trial import Loaded, load, needs_autocast, prepare_trial, train_trial, trial_arguments
from s2ft.reproduce.variants import check_variants, resolve
from s2ft.text.calibration import calibration_for
from s2ft.text.divergence import BaseDistributions, mean_loss
from s2ft.train.options import option

logger = logging.getLogger(__name__)
MODES = ("on_top", "continue", "merge")
END = (
    Column("final", "average at the end", ".1f"),
    Column("backward_transfer", "backward transfer", ".1f"),
    Column("own_state", "average in own states", ".1f"),
    Column("forgetting", "forgetting (nats)", ".4f"),
    Column("kl", "KL (nats)", ".4f"),
    Column("restored", "restored states"),
)


@dataclass(kw_only=True)
class SequenceOptions(TaskOptions):
    """Options of the kind "sequence". The help text of each field describes it."""

    variants: dict = option(
        text="by name: method, its options and learning_rate, and mode: on_top (S²FT on new units for each task), "
        "continue (one adapter for all tasks), or merge (a new adapter for each task, merged after it)"
    )
    methods: list[str] | None = option(None, "run only these variants, by their names or methods")
    learning_rate: float = option(1e-3, "peak learning rate of variants that have none")
    equal_to: str | None = option(None, "name of the variant that sets how many parameters the others may train")
    full_in_float32: bool = option(
        True, "full fine-tuning of a bfloat16 model keeps float32 weights and computes in bfloat16; false does not"
    )
    other_text: str | None = option(None, "file of other text, on which forgetting and KL are measured")
    other_rows: int = option(256, "rows of the other text that are used", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tasks) < 2:
            raise ValueError(f"tasks must be at least two, got {', '.join(self.tasks) or 'none'}")
        check_modes(self.variants)


def check_modes(variants: Mapping[str, Any]) -> dict[str, str]:
    """Return the mode of each variant. Raises ValueError for one that is unknown or does not go with the method."""
    modes = {}
    for name, variant in variants.items():
        mode = variant.get("mode") if isinstance(variant, Mapping) else None
        if mode not in MODES:
            raise ValueError(f"variant {name}: mode must be one of {', '.join(MODES)}, got {mode!r}")
        method = variant.get("method", name)
        if mode == "on_top" and method != "s2ft":
            raise ValueError(f"variant {name}: mode on_top needs method s2ft, got {method!r}")
        if mode == "merge" and method == "full":
            raise ValueError(f"variant {name}: full fine-tuning has no adapter to merge: take mode continue")
        modes[name] = mode
    return modes


# ---- the plan ------------------------------------------------------------------------------------------


def plan(options: SequenceOptions) -> list[Planned]:
    """Check the data, the model and the methods, and return a run for each variant and seed."""
    modes = check_modes(options.variants)
    plain = {
        name: {key: one for key, one in variant.items() if key != "mode"} for name, variant in options.variants.items()
    }
    every = check_variants(plain)
    if options.equal_to is not None:
        check_keys("equal_to", [options.equal_to], every)
    load_tests(options)
    shared = {**options.shared, "other_rows": options.other_rows, "other_text": None}
    shared["full_in_float32"] = options.full_in_float32
    if options.other_text:
        shared["other_text"] = file_digest(find_file(options.other_text, options.data, "other_text"))
    equal_to = every[options.equal_to] if options.equal_to else None
    runs = []
    for name, variant in resolve(options.model, check_variants(plain, options.methods), equal_to).items():
        rates = variant.pop("learning_rate") or [options.learning_rate]
        if len(rates) > 1:
            raise ValueError(f"variant {name}: learning_rate must be one number here, got {rates}")
        _check_enough_units(name, modes[name], variant, options)
        for seed in options.seeds:
            known = {**shared, **variant, "mode": modes[name], "learning_rate": rates[0], "seed": seed}
            runs.append(Planned({"method": name, "seed": seed}, known))
    return runs


def _check_enough_units(name: str, mode: str, variant: Mapping[str, Any], options: SequenceOptions) -> None:
    """Raise ValueError before anything is trained if there are not enough units for all tasks."""
    if mode != "on_top":
        return
    config = S2FTConfig(**variant["options"])
    ratios = {f"{key}_ratio": ratio for key, ratio in config.ratios.items()}
    largest = max(ratios, key=ratios.__getitem__, default=None)
    if config.budget is None and largest is not None and ratios[largest] * len(options.tasks) > 1:
        raise ValueError(
            f"variant {name}: {len(options.tasks)} tasks of {largest}={ratios[largest]:g} on disjoint units are more "
            f"than all units: take at most {1 / len(options.tasks):.3g}"
        )


# ---- one run -------------------------------------------------------------------------------------------


def measure(options: SequenceOptions, run: Planned, folder: Path) -> list[dict[str, Any]]:
    """Train all tasks in a row, and score all tasks so far after each."""
    loaded, tests = load(options.model, options.dtype, options.prompt), load_tests(options)
    meter = _Meter(loaded, options)
    learner = LEARNERS[run.configuration["mode"]](loaded, run.configuration, options, folder)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(options.tasks, 1):
        data = task_data(options, name, loaded, run.configuration["seed"], folder / "rows")
        logger.info("%s, task %d of %d, %s: %s", run.labels["method"], number, len(options.tasks), name, data.summary)
        model = learner.learn(name, data)
        known = dict(list(tests.items())[:number])
        scores = score(loaded, model, known, options, folder / "answers" / f"{number}-{name}")
        rows.append({"task": number, "after": name, "trained": run.configuration["parameters"], **scores,
                     "average": sum(scores.values()) / number, **meter.after(model)})  # fmt: skip
    rows[-1] |= transfer([{name: row[name] for name in options.tasks if name in row} for row in rows])
    restored = learner.restore()
    return rows if restored is None else [*rows[:-1], {**rows[-1], "restored": restored}]


def transfer(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Summarize the scores of tasks that were learned in a row.

    Args:
        scores: After each task, the scores of all tasks so far, by name and in their order.

    Returns:
        `final`, the mean over the tasks at the end; `backward_transfer`, the mean change of a task from the state after
        it to the end, over all tasks but the last; and `own_state`, the mean of each task in the state after it. A
        method that can restore every state can answer each task in that state.

    Example:
        >>> from s2ft.reproduce.studies.sequence import transfer
        >>> transfer([{"a": 80.0}, {"a": 70.0, "b": 90.0}])
        {'final': 80.0, 'backward_transfer': -10.0, 'own_state': 85.0}
    """
    names, last = list(scores[-1]), scores[-1]
    own = [scores[number][name] for number, name in enumerate(names)]
    changes = [last[name] - before for name, before in zip(names[:-1], own)]
    return {
        "final": sum(last.values()) / len(names),
        "backward_transfer": sum(changes) / len(changes),
        "own_state": sum(own) / len(own),
    }


class _Meter:
    """Rise of the loss on other text, and KL(base‖model) on it. The model that it is made with is the base."""

    def __init__(self, loaded: Loaded, options: SequenceOptions) -> None:
        self.rows = None
        if options.other_text:
            file = find_file(options.other_text, options.data, "other_text")
            how = (loaded.model, loaded.tokenizer, loaded.prompt, options.max_length, options.other_rows)
            self.rows = text_rows(file, *how)
            self.base = BaseDistributions.of(loaded.model, self.rows)

    def after(self, model: Any) -> dict[str, float]:
        if self.rows is None:
            return {}
        return {"forgetting": mean_loss(model, self.rows) - self.base.base_loss, "kl": self.base.kl(model)}


# ---- how tasks are learned -----------------------------------------------------------------------------


class _Learner:
    """Trains tasks in a row.

    Args:
        loaded: The model.
        known: The configuration of the run.
        options: The options.
        folder: The folder of the run.
    """

    def __init__(self, loaded: Loaded, known: Mapping[str, Any], options: SequenceOptions, folder: Path) -> None:
        self.loaded, self.known, self.options, self.folder = loaded, known, options, folder
        self.prepared: Prepared | None = None

    def learn(self, name: str, data: TrialData) -> Any:
        """Train a task. Returns the model that has learned it, in evaluation mode."""
        raise NotImplementedError

    def restore(self) -> str | None:
        """Restore every state and compare it. Returns how many are equal; None if the method can't restore them."""
        return None

    def train(self, name: str, data: TrialData) -> None:
        """Train what is prepared."""
        folder, known = self.folder / "training" / name, self.known
        autocast = needs_autocast(known["method"], self.loaded.model, self.options)
        rows, rate = len(data.train), known["learning_rate"]
        arguments = trial_arguments(self.options, rows, rate, known["seed"], folder, autocast)
        train_trial(self.loaded, self.prepared, data, arguments, folder, best=False)
        self.prepared.model.eval()


class _Continued(_Learner):
    """One adapter, or all weights, for all tasks."""

    def learn(self, name: str, data: TrialData) -> Any:
        if self.prepared is None:
            self.prepared = prepare_trial(self.loaded, self.known, data, self.options.micro)
        self.train(name, data)
        return self.prepared.model


class _Merged(_Learner):
    """A new adapter for each task, merged into the weights after it."""

    def learn(self, name: str, data: TrialData) -> Any:
        self.prepared = prepare_trial(self.loaded, self.known, data, self.options.micro)
        self.train(name, data)
        model = self.prepared.model
        self.loaded.model = s2ft.merge(model) if self.known["method"] == "s2ft" else model.merge_and_unload()
        return self.loaded.model.eval()


class _OnTop(_Learner):
    """S²FT: each task on units that no earlier one trains, with all earlier adapters active."""

    def learn(self, name: str, data: TrialData) -> Any:
        model, states = self.loaded.model, self.folder / "states"
        if self.prepared is None:
            save_state(model, states / "base.safetensors")
        options = {"seed": self.known["seed"], **self.known["options"]}
        calibration = calibration_for(
            S2FTConfig(**options), self.loaded.tokenizer, data.train, None, self.options.micro
        )
        how = {"seed": self.known["seed"], "calibration": calibration, "name": name, "on_top": True}
        self.prepared = prepare(model, "s2ft", options, **how)
        self.train(name, data)
        s2ft.freeze_adapter(model)
        s2ft.save_adapter(model, self.folder / "adapters" / name, name)
        save_state(model, states / f"{name}.safetensors")
        return model

    def restore(self) -> str:
        """Load the saved adapters into the base, and switch to every state, the last one first.

        Raises:
            RuntimeError: A weight has other bits than after the task.
        """
        names, states = list(self.options.tasks), self.folder / "states"
        model = s2ft.detach(self.loaded.model)
        self._compare(model, states / "base.safetensors")
        for name in names:
            s2ft.load_adapter(model, self.folder / "adapters" / name, active=False)
        for count in range(len(names), 0, -1):
            s2ft.set_adapter(model, dict.fromkeys(names[:count], 1.0))
            self._compare(model, states / f"{names[count - 1]}.safetensors")
        self._compare(s2ft.detach(model), states / "base.safetensors")
        for file in states.iterdir():
            file.unlink()  # they take as much room as the model, each
        states.rmdir()
        return f"{len(names)} of {len(names)}"

    @staticmethod
    def _compare(model: Any, file: Path) -> None:
        wrong = differing(model, file)
        if wrong:
            raise RuntimeError(
                f"the state {file.stem} is not restored: {len(wrong)} weights differ, such as {wrong[0]}"
            )


LEARNERS: dict[str, Callable[..., _Learner]] = {"on_top": _OnTop, "continue": _Continued, "merge": _Merged}


# ---- tables and figures --------------------------------------------------------------------------------


def tables(recipe: Recipe, options: SequenceOptions, runs: Sequence[Run]) -> list[Table]:
    """Return the summary of each method, and the accuracies of all tasks after each task."""
    last = [_only_last(run) for run in runs]
    values = [Column("trained", "parameters of a task", ",d"), *END]
    notes = [
        "backward transfer: mean change of a task from the state after it to the end, in points",
        "own states: each task in the state right after it; only a method that restores its states can answer so",
    ]
    scores = [Column(name, form=".1f") for name in (*options.tasks, "average")]
    by = [Column("method"), Column("task", "tasks"), Column("after")]
    lost = [column for column in END if column.name in ("forgetting", "kl")]
    return [
        summary("results", recipe.title, last, [Column("method")], values, notes),
        summary("tasks", f"{recipe.title}: percent right after each task", runs, by, [*scores, *lost]),
    ]


def _only_last(run: Run) -> Run:
    return replace(run, rows=run.rows[-1:])


def figures(recipe: Recipe, options: SequenceOptions, runs: Sequence[Run]) -> list[Figure]:
    """Return the average over the tasks so far, and the forgetting, after each task."""
    found = []
    for name, title, y in (
        ("average", "average over the tasks so far", "right answers (%)"),
        ("forgetting", "forgetting", "rise of the loss on other text (nats a token)"),
        ("kl", "distance from the base", "KL(base‖tuned) on other text (nats)"),
    ):
        series = []
        for method in dict.fromkeys(run.labels["method"] for run in runs):
            done = [run for run in runs if run.status == DONE and run.labels["method"] == method]
            done = [run for run in done if all(name in row for row in run.rows)]
            if done:
                spreads = [Spread.of([row[name] for row in rows]) for rows in zip(*(run.rows for run in done))]
                means, errors = [one.mean for one in spreads], [one.sd or 0.0 for one in spreads]
                series.append(Series(method, list(range(1, len(spreads) + 1)), means, errors))
        found.append(Figure(name, f"{recipe.title}: {title}", "tasks learned", y, series))
    return found


# ---- smoke ---------------------------------------------------------------------------------------------


def smoke(folder: Path) -> dict[str, Any]:
    """Write the tiny model and the made-up data, and return the options that name them."""
    return {"model": smoke_model(folder / "model"), "data": smoke_data(folder / "data")}


KIND = Kind(SequenceOptions, plan, measure, tables, figures, smoke)
