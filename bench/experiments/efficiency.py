"""Time and memory of a training step over batch and length (S²FT paper, section 5.3).

A model with random weights is trained by each method on each shape, in a process of its own, so that no peak depends
on another run. A run is the times of some steps after others that warm up. The methods take turns, round by round. A
lack of memory is a result, "out of memory".
"""

import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.experiments.matched_methods import trained_parameters
from bench.experiments.memory import PeakMemory, limited
from bench.experiments.printing import Column, Spread, Table, summary
from bench.experiments.random_models import at_least_one_unit, config_of, random_model
from bench.experiments.runner import OOM, ExperimentRun, Results, Stage, check_names
from s2ft.estimation.devices import size_of
from s2ft.train.device import gpu_or_cpu
from s2ft.train.tuners import TUNERS, prepare

KEYS = ("settings", "rows", "batches", "lengths", "rounds", "raise_ratios")
NEEDED = ("rows", "batches", "lengths", "rounds")
SETTINGS = ("model", "dtype", "steps", "warmup", "gradient_checkpointing", "device", "memory")
ROW = ("method", "options", "title")
PARTS = ("forward", "backward", "update")
# A model on which a process runs a step before it measures, so that no peak has the code of libraries.
SMALL = dict(
    model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)


def stages(experiment: dict[str, Any]) -> list[Stage]:
    """Check the model and the methods; the runs are, for each shape, round after round of all methods."""
    found = runs(experiment)
    return [Stage(found, alone=True, fresh=True)]


def runs(experiment: dict[str, Any]) -> list[ExperimentRun]:
    """Return the runs. Ratios of S²FT that select no unit of the model are raised until they select one."""
    settings = {**experiment["settings"], "device": experiment["settings"].get("device") or str(gpu_or_cpu())}
    config = config_of(settings["model"])
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max(experiment["lengths"]) > longest:
        raise ValueError(f"lengths must be at most {longest}, the context of the model, got {experiment['lengths']}")
    hollow, rows = random_model(config, settings["dtype"], "meta"), {}
    for name, row in experiment["rows"].items():
        check_names(f"row {name}, method", [row.get("method")], TUNERS)
        options = {**TUNERS[row["method"]].defaults, **row.get("options", {})}
        if row["method"] == "s2ft" and experiment.get("raise_ratios", True):
            options = at_least_one_unit(hollow, options)
        rows[name] = {"method": row["method"], "options": options}
        rows[name]["trained"] = trained_parameters(hollow, **{key: rows[name][key] for key in ("method", "options")})
    found = []
    for length in experiment["lengths"]:
        for batch in experiment["batches"]:
            for number in range(experiment["rounds"]):
                first = number % len(rows)
                for name in [*rows][first:] + [*rows][:first]:
                    shape = {"batch": batch, "length": length, "round": number}
                    found.append(
                        ExperimentRun({"method": name, **shape}, {**settings, **shape, "row": name, **rows[name]})
                    )
    return found


def measure(settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Measure one method on one shape."""
    # transformers warns about a name that PEFT still uses, once in every process
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    small = {key: value for key, value in settings["options"].items() if key == "autocast_adapter_dtype"}
    _train({**settings, "model": SMALL, "options": small, "batch": 1, "length": 8, "steps": 1, "warmup": 0})
    with limited(settings["device"], size_of(settings.get("memory"), "memory")):
        memory = PeakMemory(settings["device"])
        steps, trained = _train(settings, memory)
    if trained != settings["trained"]:
        raise RuntimeError(f"the plan says that {settings['trained']:,} parameters are trained, got {trained:,}")
    row = {"trained": trained, "peak_gb": round(memory.peak() / 2**30, 4)}
    for place, part in enumerate(PARTS):
        row[f"{part}_ms"] = 1000 * statistics.median(step[place] for step in steps)
    return [
        {**row, "step_ms": 1000 * statistics.median(map(sum, steps)), "steps_ms": [1000 * sum(step) for step in steps]}
    ]


def _train(settings: dict[str, Any], memory: PeakMemory | None = None) -> tuple[list[tuple[float, ...]], int]:
    """Train some steps. Returns the seconds of the parts of the measured ones and the number of trained parameters."""
    device = settings["device"]
    model = random_model(config_of(settings["model"]), settings["dtype"], device)
    if settings.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepared = prepare(model, settings["method"], settings["options"])
    prepared.model.train()
    optimizer = torch.optim.AdamW([one for one in prepared.model.parameters() if one.requires_grad], lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    shape = (settings["batch"], settings["length"])
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(device)
    if memory is not None:
        memory.forget_peak()
    steps = []
    for _ in range(settings["warmup"] + settings["steps"]):
        moments = [now(device)]
        loss = prepared.model(input_ids=ids, labels=ids, use_cache=False).loss
        moments.append(now(device))
        loss.backward()
        moments.append(now(device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments.append(now(device))
        steps.append(tuple(after - before for before, after in zip(moments, moments[1:])))
    return steps[settings["warmup"] :], prepared.trainable


def now(device: str) -> float:
    """Return the time in seconds of a clock for differences. A GPU has then done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- tables ----------------------------------------------------------------------------------------------


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return time and memory by shape and method, and a table with the parts of a step."""
    by = [Column("method"), Column("batch"), Column("length")]
    title, every = experiment["title"], runs(experiment)
    values = [Column("trained", "parameters", ",d"), *(Column(f"{part}_ms", f"{part} ms", ".4g") for part in PARTS)]
    values += [Column("step_ms", "step ms", ".4g"), Column("peak_gb", "memory GB", ".3f")]
    return [
        _by_method("latency", f"{title}: ms of a step", experiment, every, results, "step_ms", ".4g"),
        _by_method("memory", f"{title}: peak memory in GB of 2³⁰ bytes", experiment, every, results, "peak_gb", ".3f"),
        summary("steps", f"{title}: parts of a step", every, results, by, values),
    ]


def _by_method(
    name: str, title: str, experiment: dict[str, Any], every: list[ExperimentRun], results: Results, key: str, form: str
) -> Table:
    """A row for each shape and a column for each method. A number is the mean over the rounds."""
    methods, rows = list(experiment["rows"]), []
    for length in experiment["lengths"]:
        for batch in experiment["batches"]:
            shape = [run for run in every if (run.labels["batch"], run.labels["length"]) == (batch, length)]
            rows.append(
                [
                    batch,
                    length,
                    *(_cell([run for run in shape if run.labels["method"] == one], results, key) for one in methods),
                ]
            )
    columns = [Column("batch"), Column("length"), *(Column(method, form=form) for method in methods)]
    return Table(name, title, columns, rows, [f"medians of {experiment['rounds']} processes"])


def _cell(mine: list[ExperimentRun], results: Results, key: str) -> Any:
    if any((results.line(run) or {}).get("status") == OOM for run in mine):
        return OOM
    values = [row[key] for run in mine for row in results.rows(run)]
    return Spread.of(values) if values else None
