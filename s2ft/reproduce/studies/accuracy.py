"""Train methods or variants of a method on data, and score them on the tasks of a suite.

The recipes commonsense, arithmetic, instruction, selection and projections are of this kind.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from s2ft.reproduce.data import TrialData, find_file, text_rows, trial_data
from s2ft.reproduce.figures import Figure, Series
from s2ft.reproduce.judge import read_questions, write_answers
from s2ft.reproduce.kind import Kind, Planned
from s2ft.reproduce.recipe import Recipe, check_keys
from s2ft.reproduce.results import DONE, Run, file_digest, name_of
from s2ft.reproduce.smoke import smoke_data, smoke_model
from s2ft.reproduce.tables import Column, Spread, Table, summary
from s2ft.reproduce.training_options import TrainingOptions
from s2ft.reproduce.trial import (
    Loaded,
    Meter,
    gpu_peak,
    load,
    needs_autocast,
    prepare_trial,
    reset_gpu_peak,
    save_trial,
    score_tasks,
    timed,
    train_trial,
    trial_arguments,
)
from s2ft.reproduce.variants import check_variants, resolve
from s2ft.text.scoring import TASKS
from s2ft.text.suites import LoadedTask, SuiteTask, find_suite, load_suite
from s2ft.train.options import option

logger = logging.getLogger(__name__)
BASE = "base"  # the method of the run that scores the model without training
CHOOSING = ("seeds", "methods", "variants", "score_base", "equal_to", "save_adapters")  # they choose runs
FILES = ("data", "train", "tests", "skip_missing", "other_text", "questions")  # recorded by their content
OF_TRAINING = ("full_in_float32", "schedule", "warmup_steps", "epochs", "max_steps", "batch_size", "micro_batch_size",
               "weight_decay", "betas", "max_grad_norm", "gradient_checkpointing", "order", "eval_steps", "eval_from",
               "best")  # fmt: skip # options without effect on the base
LOSSES = (
    Column("held_out_loss", "held-out loss", ".4f"),
    Column("forgetting", "forgetting (nats)", ".4f"),
    Column("kl", "KL (nats)", ".4f"),
)
COSTS = (
    Column("steps", "updates", "d"),
    Column("best_step", "best at", "d"),
    Column("training_loss", "last loss", ".4f"),
    Column("seconds_per_step", "s an update", ".4f"),
    Column("tokens_per_second", "tokens/s", ".0f"),
    Column("training_seconds", "training s", ".0f"),
    Column("scoring_seconds", "scoring s", ".0f"),
    Column("gpu_bytes", "GPU memory (bytes)", ",.0f"),
)
PERCENT = "right answers (%)"
NO_SCORES = ("trained", "other_loss", "trained_on_tests")  # further keys of a row


@dataclass(kw_only=True)
class AccuracyOptions(TrainingOptions):
    """Options of the kind "accuracy". The help text of each field describes it."""

    train: list[str] = option(text="files of the training rows, in the folder `data` or anywhere")
    variants: dict = option(text="what is trained, by a name each: method, its options, its learning_rate")
    learning_rate: list[float] = option(text="peak learning rates; with several, each is a run and a row")
    methods: list[str] | None = option(None, "run only these variants, by their names or methods")
    score_base: bool = option(False, "also score the base model")
    equal_to: str | None = option(None, "name of the variant that sets how many parameters the others may train")
    tests: list[str] = option([], "suites, tasks or files that are scored")
    task: str | None = option(None, "kind of task of tests that are files", choices=TASKS)
    skip_missing: bool = option(False, "leave out tasks that have no file in the folder `data`")
    max_length: int = option(2048, "longest row in tokens; longer rows are left out", least=2)
    full_in_float32: bool = option(
        True, "full fine-tuning of a bfloat16 model keeps float32 weights and computes in bfloat16; false does not"
    )
    epochs: float = option(3.0, "passes over the training rows")
    validation_rows: int = option(0, "rows of the training data that are held out", least=0)
    eval_steps: int | None = option(None, "updates between evaluations on the held-out rows", least=1)
    eval_from: float = option(0.0, "share of the run before the first evaluation", least=0)
    best: bool = option(False, "score the parameters of the best evaluation; false scores the last ones")
    other_text: str | None = option(None, "file of other text; the rise of the loss on it is the forgetting")
    other_rows: int = option(256, "rows of the other text that are used", least=1)
    kl: bool = option(False, "measure KL(base‖tuned) on the held-out rows")
    questions: str | None = option(None, "file of questions as in MT-Bench, whose answers are written for a judge")
    save_adapters: bool = option(True, "save the adapter of each run; full fine-tuning has none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rate:
            raise ValueError("learning_rate needs at least one value")
        if any(rate <= 0 for rate in self.learning_rate):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if not 0 <= self.eval_from < 1:
            raise ValueError(f"eval_from must be a share from 0 to below 1, got {self.eval_from}")
        for name in ("best", "eval_steps", "kl"):
            if getattr(self, name) and not self.validation_rows:
                raise ValueError(f"{name} needs held-out rows: set validation_rows")
        if self.best and not self.eval_steps:
            raise ValueError("best needs evaluations: set eval_steps")
        if not (self.tests or self.validation_rows or self.questions or self.other_text):
            raise ValueError("nothing would be measured: set tests, validation_rows, other_text or questions")


# ---- the plan ------------------------------------------------------------------------------------------


def plan(options: AccuracyOptions) -> list[Planned]:
    """Check the options, the files and the methods, and return the runs."""
    variants = check_variants(options.variants, options.methods)
    equal_to = None
    if options.equal_to is not None:
        every = check_variants(options.variants)
        check_keys("equal_to", [options.equal_to], every)
        equal_to = every[options.equal_to]
    shared = {one.name: getattr(options, one.name) for one in fields(options)}
    shared = {name: value for name, value in shared.items() if name not in (*CHOOSING, *FILES, "learning_rate")}
    shared["files"] = _contents(options)
    check_measures(options)
    runs = []
    if options.score_base:
        without = {name: value for name, value in shared.items() if name not in OF_TRAINING}
        labels = {"method": BASE, "rate": None, "seed": None}
        runs.append(Planned(labels, {**without, "method": BASE, "seed": options.seeds[0]}))
    for name, variant in resolve(options.model, variants, equal_to).items():
        for rate in variant.pop("learning_rate") or options.learning_rate:
            for seed in options.seeds:
                labels = {"method": name, "rate": rate, "seed": seed}
                runs.append(Planned(labels, {**shared, **variant, "learning_rate": rate, "seed": seed}))
    return runs


def check_measures(options: AccuracyOptions) -> None:
    """Read the data that is scored, so that a mistake in it is found before anything is trained."""
    load_suite(_tasks(options), options.test_limit)
    if options.questions:
        read_questions(find_file(options.questions, options.data, "questions"))


def _tasks(options: AccuracyOptions) -> list[SuiteTask]:
    if not options.tests:
        return []
    words = [_file_or_word(word, options.data) for word in options.tests]
    return find_suite(words, options.data, options.task, skip_missing=options.skip_missing)


def _file_or_word(word: str, folder: str | None) -> str:
    """A file of tests in the folder of the data, or the word itself."""
    path = Path(folder).expanduser() / word if folder is not None else None
    return str(path) if path is not None and path.is_file() else word


def _contents(options: AccuracyOptions) -> dict[str, Any]:
    """The data files by their contents, so that a result belongs to what was read, wherever it lies."""
    named = {"train": [find_file(name, options.data, "train") for name in options.train]}
    named |= {
        name: [find_file(getattr(options, name), options.data, name)]
        for name in ("other_text", "questions")
        if getattr(options, name)
    }
    found: dict[str, Any] = {name: [_content(file) for file in files] for name, files in named.items()}
    found["tests"] = {task.name: [task.kind, _content(task.data)] for task in _tasks(options)}
    return found


def _content(file: str) -> str:
    """The SHA-256 of a file, or a name on the hub."""
    return file_digest(file) if Path(file).is_file() else file


# ---- one run -------------------------------------------------------------------------------------------


def measure(options: AccuracyOptions, run: Planned, folder: Path) -> list[dict[str, Any]]:
    """Load the model, train it, and measure it."""
    configuration, row = run.configuration, {}
    seed, trains = configuration["seed"], configuration["method"] != BASE
    loaded = load(options.model, options.dtype, options.prompt)
    files = [find_file(name, options.data, "train") for name in options.train]
    how = {"seed": seed, "max_length": options.max_length, "held_out": options.validation_rows, "limit": options.limit}
    data = trial_data(files, loaded.model, loaded.tokenizer, loaded.prompt, **how)
    logger.info("%s", data.summary)
    meter = Meter(data.held_out, _other_rows(options, loaded), options.kl)
    model = loaded.model
    if trains:
        autocast = needs_autocast(configuration["method"], loaded.model, options)
        rate = configuration["learning_rate"]
        arguments = trial_arguments(options, len(data.train), rate, seed, folder, autocast)
        prepared = prepare_trial(loaded, configuration, data, arguments.per_device_train_batch_size)
        model, row["trained"] = prepared.model, prepared.trainable
        logger.info("%s", prepared.report)
    meter.before(model)
    if trains:
        row |= _train(loaded, prepared, data, arguments, folder, options)
    with timed(row, "scoring_seconds"):
        row |= meter.after(model)
        if options.tests:
            suite = load_suite(_tasks(options), options.test_limit)
            row |= score_tasks(loaded, model, suite, options, folder)
            row["trained_on_tests"] = _trained_on_tests(data, suite) if trains else None
        if options.questions:
            questions = read_questions(find_file(options.questions, options.data, "questions"))
            write_answers(loaded, model, questions, name_of(run.labels), options, folder / "answers")
    return [row]


def _trained_on_tests(data: TrialData, suite: Sequence[LoadedTask]) -> int:
    """Count the rows of the tests whose questions are in the training data, and log them."""
    counts = {one.task.name: data.known(one.examples) for one in suite}
    if any(counts.values()):
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        logger.warning("questions of the tests are in the training data: %s", listed)
    return sum(counts.values())


def _train(loaded: Loaded, prepared, data: TrialData, arguments, folder: Path, options) -> dict[str, Any]:
    reset_gpu_peak()
    trained, best = train_trial(loaded, prepared, data, arguments, folder, options.best)
    if options.save_adapters:
        save_trial(prepared, loaded, folder)
    row = {
        "steps": trained.steps,
        "training_seconds": round(trained.seconds, 3),
        "seconds_per_step": round(trained.seconds_per_step, 5),
        "tokens_per_second": round(trained.tokens_per_second, 1),
        "training_loss": trained.losses[-1] if trained.losses else None,
        **gpu_peak(),
    }
    return {**row, "best_step": best.step} if options.best else row


def _other_rows(options: AccuracyOptions, loaded: Loaded):
    if not options.other_text:
        return None
    file = find_file(options.other_text, options.data, "other_text")
    return text_rows(file, loaded.model, loaded.tokenizer, loaded.prompt, options.max_length, options.other_rows)


# ---- tables and figures --------------------------------------------------------------------------------


def tables(recipe: Recipe, options: AccuracyOptions, runs: Sequence[Run]) -> list[Table]:
    """Return the table of accuracies and the table of everything else that was measured."""
    by = [Column("method"), Column("rate", "learning rate")]
    scored = [Column(name, form=".1f") for name in _scores(runs)]
    measured = [Column("trained", "parameters", ",d")]
    lost = [column for column in LOSSES if any(column.name in row for run in runs for row in run.rows)]
    notes = [f"percent right of generated answers, {options.num_beams} beam{'s' * (options.num_beams > 1)}"]
    leaked = max((row.get("trained_on_tests") or 0 for run in runs for row in run.rows), default=0)
    notes += [f"the questions of {leaked} rows of the tests are in the training data"] if leaked else []
    found = [summary("results", recipe.title, runs, by, [*measured, *scored, *lost], notes if scored else [])]
    found.append(summary("training", f"{recipe.title}: training", runs, by, [*measured, *COSTS], []))
    return found


def _scores(runs: Sequence[Run]) -> list[str]:
    """The tasks that any run has a score of, and their average."""
    known = {column.name for column in (*LOSSES, *COSTS)} | set(NO_SCORES)
    return list(dict.fromkeys(name for run in runs for row in run.rows for name in row if name not in known))


def figures(recipe: Recipe, options: AccuracyOptions, runs: Sequence[Run]) -> list[Figure]:
    """Return bars of the accuracies, and what was learned against what was lost, as far as both were measured."""
    groups: dict[str, list[dict]] = {}
    for run in runs:
        if run.status == DONE:
            rate = run.labels.get("rate")
            groups.setdefault(run.labels["method"] + (f", {rate:g}" if rate else ""), []).extend(run.rows)
    names = _scores(runs)
    bars = [Series(label, names, *_spread(rows, names)) for label, rows in groups.items()] if names else []
    found = [Figure("accuracy", recipe.title, "", PERCENT, bars, "bars")]
    learned, label = ("average", PERCENT) if names else ("held_out_loss", "loss on held-out rows (nats a token)")
    for lost, text in (
        ("forgetting", "rise of the loss on other text (nats a token)"),
        ("kl", "KL(base‖tuned) (nats)"),
    ):
        points = []
        for name, rows in groups.items():
            if all(any(key in row for row in rows) for key in (lost, learned)):
                (x, x_error), (y, y_error) = _spread(rows, [lost]), _spread(rows, [learned])
                points.append(Series(name, x, y, y_error, x_error))
        found.append(Figure(f"learned_and_{lost}", recipe.title, text, label, points, "points"))
    return found


def _spread(rows: list[dict], names: Sequence[str]) -> tuple[list[float], list[float]]:
    """The means of values over rows, and their standard deviations."""
    found = [Spread.of([row[name] for row in rows if name in row] or [float("nan")]) for name in names]
    return [spread.mean for spread in found], [spread.sd or 0.0 for spread in found]


# ---- smoke ---------------------------------------------------------------------------------------------


def smoke(folder: Path) -> dict[str, Any]:
    """Write the tiny model and the made-up data, and return the options that name them."""
    return {"model": smoke_model(folder / "model"), "data": smoke_data(folder / "data")}


KIND = Kind(AccuracyOptions, plan, measure, tables, figures, smoke)
