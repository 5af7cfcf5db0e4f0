"""Time and memory of a training step over batch and length (S²FT paper, section 5.3), each run in its own process.

A step is forward, backward and update of AdamW. The weights are random. A process measures one method on one shape: its
peak memory, and the times of some steps after others that warm up. The methods take turns, round by round. A lack of
memory is a result, "OOM".
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from s2ft.estimation.result import size_of
from s2ft.reproduce.figures import Figure, Series
from s2ft.reproduce.kind import Kind, Planned
from s2ft.reproduce.methods import METHODS, prepare
from s2ft.reproduce.processes import PeakMemory, free_bytes, in_own_process
from s2ft.reproduce.random_models import at_least_one_unit, config_of, random_model
from s2ft.reproduce.recipe import Recipe
from s2ft.reproduce.results import DONE, Run
from s2ft.reproduce.tables import Column, Spread, Table, summary
from s2ft.reproduce.timing import milliseconds, now
from s2ft.reproduce.variants import check_variants, trained_parameters
from s2ft.text.models import DTYPES
from s2ft.train.options import check_fields, option
from s2ft.train.out_of_memory import OutOfMemory

logger = logging.getLogger(__name__)
PARTS = ("forward", "backward", "update")
OK, OOM = "ok", "OOM"
GB = 2**30
# A model on which a process runs a step before it measures, so that no peak has the code of libraries.
SMALL = dict(
    model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)


@dataclass
class EfficiencyOptions:
    """Options of the kind "efficiency". The help text of each field describes it."""

    model: str | dict = option(
        text="a folder, a config file (.json), a .gguf file, a name on the hub, or the fields of a config; only the "
        "config is read, and the weights are random"
    )
    variants: dict = option(text="what is trained, by a name each: method and its options")
    methods: list[str] | None = option(None, "run only these variants, by their names or methods")
    batches: list[int] = option([1, 2, 4], "rows of a step")
    lengths: list[int] = option([256, 512, 1024], "tokens of a row")
    dtype: str = option("bfloat16", "dtype of the weights", choices=tuple(one for one in DTYPES if one != "auto"))
    rounds: int = option(3, "processes of each method and shape; the methods take turns", least=1)
    steps: int = option(5, "measured steps of a process, of which the median counts", least=1)
    warmup: int = option(2, "steps before them", least=0)
    raise_ratios: bool = option(True, "raise ratios of S²FT that select no unit of this model until they select one")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass")
    device: str | None = option(None, "cpu or cuda; null is the GPU if there is one", choices=("cpu", "cuda"))
    memory: str | None = option(
        None, "memory that a step may take, such as 80GB; on the CPU at most nine tenths of what is free"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batches", "lengths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be one or more numbers of at least 1, got {getattr(self, name)!r}")
        size_of(self.memory, "memory")

    @property
    def place(self) -> str:
        """The device."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


# ---- the plan ------------------------------------------------------------------------------------------


def plan(options: EfficiencyOptions) -> list[Planned]:
    """Check the model and the methods, and return the runs: for each shape, round after round of all methods."""
    variants = _resolved(options)
    shared = {name: getattr(options, name) for name in ("model", "dtype", "steps", "warmup", "gradient_checkpointing")}
    shared |= {"device": options.place, "memory": options.memory}
    runs = []
    for length in options.lengths:
        for batch in options.batches:
            for number in range(options.rounds):
                first = number % len(variants)
                for name in [*variants][first:] + [*variants][:first]:
                    shape = {"batch": batch, "length": length, "round": number}
                    runs.append(Planned({"method": name, **shape}, {**shared, **shape, "name": name, **variants[name]}))
    return runs


def _resolved(options: EfficiencyOptions) -> dict[str, dict[str, Any]]:
    """The variants, each with all options of its method and the number of parameters that it trains."""
    config = config_of(options.model)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max(options.lengths) > longest:
        raise ValueError(f"lengths must be at most {longest}, the context of the model, got {max(options.lengths)}")
    hollow, resolved = random_model(config, options.dtype, "meta"), {}
    for name, variant in check_variants(options.variants, options.methods).items():
        method, chosen = variant["method"], {**METHODS[variant["method"]].defaults, **variant["options"]}
        try:
            if method == "s2ft" and options.raise_ratios:
                chosen = at_least_one_unit(hollow, chosen)
            count = trained_parameters(hollow, method, chosen)
        except (ValueError, TypeError) as error:
            raise ValueError(f"variant {name}: {error}") from error
        resolved[name] = {"method": method, "options": chosen, "trained": count}
    return resolved


# ---- one run -------------------------------------------------------------------------------------------


def measure(options: EfficiencyOptions, run: Planned, folder: Path) -> list[dict[str, Any]]:
    """Measure one method on one shape in a process of its own."""
    known, device = run.configuration, options.place
    cell = Cell(config_of(options.model), known["method"], known["options"], known["batch"], known["length"],
                options.dtype, device, options.steps, options.warmup, options.gradient_checkpointing)  # fmt: skip
    limits = _limits(device, size_of(options.memory, "memory"))
    try:
        found = in_own_process(measure_cell, cell, limits["gpu"], limit_bytes=limits["cpu"], imports=_imports(options))
    except OutOfMemory as error:
        logger.info("%s: out of memory (%s)", run.labels["method"], error.reason)
        return [{"status": OOM, "trained": known["trained"], "reason": error.reason}]
    if found["trained"] != known["trained"]:
        raise RuntimeError(f"the plan says that {known['trained']:,} parameters are trained, got {found['trained']:,}")
    row = {"status": OK, "trained": found["trained"], "peak_bytes": found["peak_bytes"]}
    row["peak_gb"] = round(found["peak_bytes"] / GB, 4)
    for place, part in enumerate(PARTS):
        row[f"{part}_ms"] = milliseconds([step[place] for step in found["steps"]])
    row["step_ms"] = milliseconds([sum(step) for step in found["steps"]])
    return [{**row, "steps_ms": [round(1000 * sum(step), 3) for step in found["steps"]]}]


def _imports(options: EfficiencyOptions) -> list[str]:
    """Modules that take long to import and that all processes need."""
    methods = {one["method"] for one in check_variants(options.variants, options.methods).values()}
    return ["peft"] if methods - {"s2ft", "full"} else []


def _limits(device: str, limit_bytes: int | None) -> dict[str, int | None]:
    """The memory that a step may take. On the CPU it is never more than what is free, so that nothing else is ended."""
    if device == "cuda":
        return {"gpu": limit_bytes, "cpu": None}
    free = free_bytes()
    known = [limit for limit in (limit_bytes, None if free is None else int(0.9 * free)) if limit is not None]
    return {"gpu": None, "cpu": min(known, default=None)}


# ---- one cell, in its own process --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One method on one shape.

    Attributes:
        config: The model's config.
        method: Name of the method.
        options: Its options.
        batch: Rows.
        length: Tokens of a row.
        dtype: Dtype of the weights.
        device: "cpu" or "cuda".
        steps: Measured steps.
        warmup: Steps before them.
        checkpointing: Whether activations are computed again in the backward pass.
    """

    config: Any
    method: str
    options: dict[str, Any]
    batch: int
    length: int
    dtype: str
    device: str
    steps: int
    warmup: int
    checkpointing: bool


def measure_cell(cell: Cell, limit_bytes: int | None = None) -> dict[str, Any]:
    """Measure one cell in this process.

    Args:
        cell: What is measured.
        limit_bytes: Memory of a GPU that the process may take.

    Returns:
        `steps`, the seconds of forward, backward and update of each measured step; `peak_bytes`, the peak memory of the
        process above what it had before the model was made, so with the weights; `trained`, the number of trained
        parameters.
    """
    # transformers warns about a name that PEFT still uses, once in every process
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
    _load_code(cell)
    memory = PeakMemory(cell.device, limit_bytes)
    times, trained = _train(cell, memory)
    return {"steps": times, "peak_bytes": memory.peak(), "trained": trained}


def _load_code(cell: Cell) -> None:
    """Run a step of the method on a small model."""
    options = {key: value for key, value in cell.options.items() if key == "autocast_adapter_dtype"}
    _train(replace(cell, config=config_of(SMALL), options=options, batch=1, length=8, steps=1, warmup=0))


def _train(cell: Cell, memory: PeakMemory | None = None) -> tuple[list[tuple[float, ...]], int]:
    """Train the steps of a cell. Returns the seconds of the measured ones and the number of trained parameters."""
    model = random_model(cell.config, cell.dtype, cell.device)
    if cell.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prepared = prepare(model, cell.method, cell.options)
    prepared.model.train()
    trained = [parameter for parameter in prepared.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (cell.batch, cell.length), generator=generator).to(cell.device)
    if memory is not None:
        memory.forget_peak()
    times = [_step(prepared.model, optimizer, ids, cell.device) for _ in range(cell.warmup + cell.steps)]
    return times[cell.warmup :], prepared.trainable


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, device: str) -> tuple[float, ...]:
    """Train one step. Returns the seconds of forward, backward and update."""
    moments = [now(device)]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    moments.append(now(device))
    loss.backward()
    moments.append(now(device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moments.append(now(device))
    return tuple(after - before for before, after in zip(moments, moments[1:]))


# ---- tables and figures --------------------------------------------------------------------------------


def tables(recipe: Recipe, options: EfficiencyOptions, runs: Sequence[Run]) -> list[Table]:
    """Return time and memory by shape and method, and a table with the parts of a step."""
    by = [Column("method"), Column("batch"), Column("length")]
    where = f"{options.dtype}, {options.place}"
    values = [Column("status"), Column("trained", "parameters", ",d"), *(_ms(part) for part in (*PARTS, "step"))]
    values.append(Column("peak_gb", "memory GB", ".3f"))
    return [
        _by_method("latency", f"{recipe.title}: ms of a step ({where})", runs, "step_ms", ".4g"),
        _by_method("memory", f"{recipe.title}: peak memory in GB of 2³⁰ bytes ({where})", runs, "peak_gb", ".3f"),
        summary("steps", f"{recipe.title}: parts of a step ({where})", runs, by, values),
    ]


def _ms(part: str) -> Column:
    return Column(f"{part}_ms", f"{part} ms", ".4g")


def _by_method(name: str, title: str, runs: Sequence[Run], key: str, form: str) -> Table:
    """A row for each shape and a column for each method. A number is the mean over the rounds."""
    methods = list(dict.fromkeys(run.labels["method"] for run in runs))
    shapes = list(dict.fromkeys((run.labels["batch"], run.labels["length"]) for run in runs))
    rows = [[*shape, *(_cell(_rows(runs, method, shape), key) for method in methods)] for shape in shapes]
    columns = [Column("batch"), Column("length"), *(Column(method, form=form) for method in methods)]
    failed = [f"failed: {run.name}" for run in runs if run.error]
    rounds = max((len(_rows(runs, method, shape)) for method in methods for shape in shapes), default=0)
    means = [f"mean ± standard deviation of the medians of {rounds} processes"] if rounds > 1 else []
    return Table(name, title, columns, rows, [*means, *failed])


def _rows(runs: Sequence[Run], method: str, shape: tuple[int, int]) -> list[dict[str, Any]]:
    chosen = [run for run in runs if run.status == DONE and run.labels["method"] == method]
    return [row for run in chosen if (run.labels["batch"], run.labels["length"]) == shape for row in run.rows]


def _cell(rows: list[dict[str, Any]], key: str) -> Any:
    if any(row["status"] == OOM for row in rows):
        return OOM
    return Spread.of([row[key] for row in rows]) if rows else None


def figures(recipe: Recipe, options: EfficiencyOptions, runs: Sequence[Run]) -> list[Figure]:
    """Return time and memory over the tokens of a step. A shape without memory has no point."""
    return [
        _figure("latency", f"{recipe.title}: time", "ms", runs, lambda row: row["step_ms"]),
        _figure("memory", f"{recipe.title}: memory", "GB", runs, lambda row: row["peak_gb"]),
    ]


def _figure(name: str, title: str, y: str, runs: Sequence[Run], value: Callable[[dict[str, Any]], float]) -> Figure:
    found = []
    for method in dict.fromkeys(run.labels["method"] for run in runs):
        points: dict[int, list[float]] = {}
        for run in runs:
            if run.labels["method"] == method and run.status == DONE and run.rows[0]["status"] == OK:
                points.setdefault(run.labels["batch"] * run.labels["length"], []).append(value(run.rows[0]))
        spreads = {tokens: Spread.of(values) for tokens, values in sorted(points.items())}
        means, errors = [one.mean for one in spreads.values()], [one.sd or 0.0 for one in spreads.values()]
        found.append(Series(method, list(spreads), means, errors))
    return Figure(name, title, "tokens of a step", y, found, "lines", "xy")


KIND = Kind(EfficiencyOptions, plan, measure, tables, figures)
