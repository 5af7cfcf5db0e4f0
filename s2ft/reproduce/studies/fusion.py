"""Two tasks in one model by a weighted sum of two adapters (S²FT paper, section 5.4).

Each adapter is trained alone on the base. The two of S²FT train the same units (`overlapping`) or have none in common
(`disjoint`). Those of LoRA are added as products, so that the sum is exact.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import s2ft
from s2ft.adapter import Adapter, overlap
from s2ft.config import S2FTConfig
from s2ft.packages import check_packages
from s2ft.reproduce.figures import Figure, Series
from s2ft.reproduce.kind import Kind, Planned
from s2ft.reproduce.methods import METHODS, Prepared, prepare
from s2ft.reproduce.recipe import Recipe
from s2ft.reproduce.results import DONE, Run
from s2ft.reproduce.smoke import smoke_data, smoke_model
from s2ft.reproduce.tables import Column, Spread, Table, summary
from s2ft.reproduce.tasks import TaskOptions, load_tests, score, task_data
from s2ft.reproduce.trial import Loaded, load, train_trial, trial_arguments
from s2ft.reproduce.variants import trained_parameters
from s2ft.text.calibration import calibration_for
from s2ft.text.models import hollow_model
from s2ft.train.options import option

logger = logging.getLogger(__name__)
PAIRS = ("disjoint", "overlapping", "lora")
BASE = "base"


@dataclass(kw_only=True)
class FusionOptions(TaskOptions):
    """Options of the kind "fusion". The help text of each field describes it."""

    pairs: list[str] = option(
        list(PAIRS), "pairs of adapters: disjoint and overlapping are of S²FT, and lora is of LoRA"
    )
    s2ft: dict = option(text="fields of S2FTConfig for both adapters of S²FT")
    lora: dict = option(text="arguments of PEFT's LoraConfig for both LoRAs")
    learning_rate: dict = option(text="peak learning rate of each task by method: {s2ft: {TASK: RATE}, lora: ...}")
    weights: list[list] = option([[1, 1], [0.5, 0.5], [0.7, 0.3], [0.3, 0.7]], "weights of the two adapters")
    score_base: bool = option(True, "also score the base model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tasks) != 2:
            raise ValueError(f"tasks must be two, got {', '.join(self.tasks) or 'none'}")
        unknown = [pair for pair in self.pairs if pair not in PAIRS]
        if unknown or not self.pairs:
            raise ValueError(f"pairs must be of {', '.join(PAIRS)}, got {', '.join(unknown) or 'none'}")
        for pair in self.weights:
            if len(pair) != 2 or not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in pair):
                raise ValueError(f"weights must be pairs of numbers, got {pair!r}")
            if 0 in pair:
                raise ValueError(f"weights must not be 0, since each adapter alone is scored anyway, got {pair!r}")
        for method in {method_of(pair) for pair in self.pairs}:
            rates = self.learning_rate.get(method)
            if not isinstance(rates, Mapping) or set(rates) != set(self.tasks):
                raise ValueError(
                    f"learning_rate.{method} must have a rate for {' and '.join(self.tasks)}, got {rates!r}"
                )


def method_of(pair: str) -> str:
    """Return the method of a pair of adapters."""
    return "lora" if pair == "lora" else "s2ft"


# ---- the plan ------------------------------------------------------------------------------------------


def plan(options: FusionOptions) -> list[Planned]:
    """Check the data, the model and the methods, and return a run for each pair and seed."""
    if "lora" in options.pairs:
        check_packages("s2ft.peft", "leave out the pair lora")
    load_tests(options)
    hollow, shared = hollow_model(options.model), options.shared
    runs = []
    if options.score_base:
        how = {name: shared[name] for name in ("model", "tasks", "dtype", "prompt", "num_beams", "max_new_tokens")}
        runs.append(Planned({"pair": BASE, "seed": None}, {**how, "test_limit": options.test_limit, "pair": BASE}))
    for pair in options.pairs:
        method = method_of(pair)
        chosen = {**METHODS[method].defaults, **getattr(options, method)}
        known = {"pair": pair, "method": method, "options": chosen, "learning_rate": options.learning_rate[method],
                 "weights": options.weights, "parameters": trained_parameters(hollow, method, chosen)}  # fmt: skip
        runs += [Planned({"pair": pair, "seed": seed}, {**shared, **known, "seed": seed}) for seed in options.seeds]
    return runs


# ---- one run -------------------------------------------------------------------------------------------


def measure(options: FusionOptions, run: Planned, folder: Path) -> list[dict[str, Any]]:
    """Train the two adapters of a pair, and score each alone and both in every weighted sum."""
    loaded, tests = load(options.model, options.dtype, options.prompt), load_tests(options)
    if run.labels["pair"] == BASE:
        return [{"weights": "0, 0", **_scores(score(loaded, loaded.model, tests, options, folder / "answers"))}]
    sums = [(1.0, 0.0), (0.0, 1.0), *((float(one), float(other)) for one, other in options.weights)]
    pair = _lora_pair if run.configuration["method"] == "lora" else _s2ft_pair
    rows = []
    for weights, model, found in pair(loaded, options, run.configuration, sums, folder):
        name = f"{weights[0]:g}, {weights[1]:g}"
        scores = _scores(score(loaded, model, tests, options, folder / "answers" / name.replace(", ", "-")))
        rows.append({"weights": name, **found, **scores})
    return rows


def _scores(found: dict[str, float]) -> dict[str, float]:
    return {**found, "average": sum(found.values()) / len(found)}


Sums = Iterator[tuple[tuple[float, float], Any, dict[str, Any]]]


def _s2ft_pair(
    loaded: Loaded, options: FusionOptions, known: Mapping[str, Any], sums: Sequence[tuple[float, float]], folder: Path
) -> Sums:
    """Train two adapters of S²FT, and yield the model with each weighted sum."""
    adapters: list[Adapter] = []
    for name in options.tasks:
        data = task_data(options, name, loaded, known["seed"], folder / "rows")
        config = _config(known, adapters[0] if adapters else None)
        calibration = calibration_for(config, loaded.tokenizer, data.train, None, options.micro)
        report = s2ft.attach(loaded.model, config, name, calibration)
        prepared = Prepared(loaded.model, loaded.model, "s2ft", dict(known["options"]), report.trainable, str(report))
        _train(prepared, loaded, data, options, known, name, folder)
        s2ft.save_adapter(loaded.model, folder / "adapters" / name)
        adapters.append(s2ft.get_adapter(loaded.model, name))
        s2ft.detach(loaded.model)
    shared = overlap(adapters)
    if known["pair"] == "disjoint" and shared.units:
        raise RuntimeError(f"the adapters should have no unit in common, and share {shared.units}")
    for adapter in adapters:
        s2ft.load_adapter(loaded.model, adapter, active=False)
    found = {"trained": known["parameters"], "shared": round(100 * shared.share, 2)}
    for weights in sums:
        s2ft.set_adapter(loaded.model, dict(zip(options.tasks, weights)))
        yield weights, loaded.model, found


def _config(known: Mapping[str, Any], first: Adapter | None) -> S2FTConfig:
    """The config of the first adapter, or of the second: the units of the first, or none of them."""
    chosen = {"seed": known["seed"], **known["options"]}
    if first is None:
        return S2FTConfig(**chosen)
    if known["pair"] == "disjoint":
        return S2FTConfig(**{**chosen, "exclude": first.selection})
    kept = {name: chosen[name] for name in ("layout", "delta_dtype", "ffn_kernel") if name in chosen}
    return S2FTConfig(units=first.selection, seed=known["seed"], **kept)


def _lora_pair(
    loaded: Loaded, options: FusionOptions, known: Mapping[str, Any], sums: Sequence[tuple[float, float]], folder: Path
) -> Sums:
    """Train two LoRAs, and yield the model with each weighted sum of their products."""
    from peft import PeftModel

    base, places = loaded.model, {name: folder / "adapters" / name for name in options.tasks}
    for name, place in places.items():
        data = task_data(options, name, loaded, known["seed"], folder / "rows")
        prepared = prepare(base, "lora", dict(known["options"]), seed=known["seed"])
        _train(prepared, loaded, data, options, known, name, folder)
        prepared.model.save_pretrained(place)
        base = prepared.model.unload()
    (first, place), (second, other) = places.items()
    model = PeftModel.from_pretrained(base, place, adapter_name=first)
    model.load_adapter(other, second)
    for number, weights in enumerate(sums):
        if 0.0 in weights:
            model.set_adapter(first if weights[0] else second)
        else:  # "cat" gives exactly the weighted sum of the two products
            model.add_weighted_adapter([first, second], list(weights), f"sum{number}", combination_type="cat")
            model.set_adapter(f"sum{number}")
        yield weights, model.eval(), {"trained": known["parameters"]}


def _train(
    prepared: Prepared, loaded: Loaded, data: Any, options: FusionOptions, known: Mapping[str, Any], name: str, folder
) -> None:
    logger.info("%s, %s: %s", known["pair"], name, data.summary)
    rate, place = float(known["learning_rate"][name]), folder / "training" / name
    arguments = trial_arguments(options, len(data.train), rate, known["seed"], place)
    train_trial(loaded, prepared, data, arguments, place, best=False)
    prepared.model.eval()


# ---- tables and figures --------------------------------------------------------------------------------


def tables(recipe: Recipe, options: FusionOptions, runs: Sequence[Run]) -> list[Table]:
    """Return the accuracies by pair and weights."""
    first, second = options.tasks
    by = [Column("pair"), Column("weights", f"weights ({first}, {second})")]
    values = [Column("trained", "parameters of each", ",d"), Column("shared", "shared units %", ".1f")]
    values += [Column(name, form=".1f") for name in (*options.tasks, "average")]
    return [summary("results", recipe.title, runs, by, values, ["percent right of generated answers"])]


def figures(recipe: Recipe, options: FusionOptions, runs: Sequence[Run]) -> list[Figure]:
    """Return the accuracy on the second task against that on the first, a series for each pair."""
    first, second = options.tasks
    series = []
    for pair in dict.fromkeys(run.labels["pair"] for run in runs):
        rows = [row for run in runs if run.status == DONE and run.labels["pair"] == pair for row in run.rows]
        notes = list(dict.fromkeys(row["weights"] for row in rows))
        spread = {
            name: [Spread.of([row[name] for row in rows if row["weights"] == note]) for note in notes]
            for name in (first, second)
        }
        means = {name: [one.mean for one in found] for name, found in spread.items()}
        errors = {name: [one.sd or 0.0 for one in found] for name, found in spread.items()}
        series.append(Series(pair, means[first], means[second], errors[second], errors[first], notes))
    return [Figure("fusion", recipe.title, f"{first} (%)", f"{second} (%)", series, "points")]


def smoke(folder: Path) -> dict[str, Any]:
    """Write the tiny model and the made-up data, and return the options that name them."""
    return {"model": smoke_model(folder / "model"), "data": smoke_data(folder / "data")}


KIND = Kind(FusionOptions, plan, measure, tables, figures, smoke)
