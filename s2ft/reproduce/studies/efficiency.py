"""Time and memory of a training step over batch and length (S²FT paper, section 5.3), each cell in its own process.

A step is forward, backward and update of AdamW. The weights are random. A process measures one method on one shape: its
peak memory, and the times of some steps after others that warm up. The methods take turns, round by round, and the
median is taken over the steps of all rounds. A lack of memory ends one cell.
"""

import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import s2ft
from s2ft.config import S2FTConfig
from s2ft.reproduce.methods import METHODS, prepare
from s2ft.reproduce.studies.processes import free_bytes, in_own_process, size_of_process
from s2ft.reproduce.studies.random_models import Model, at_least_one_unit, config_of, random_model
from s2ft.reproduce.studies.timing import milliseconds, wait
from s2ft.train.out_of_memory import OutOfMemory

logger = logging.getLogger(__name__)
PARTS = ("forward", "backward", "update")
OOM = "OOM"
# A model on which a process runs a step before it measures, so that no peak has the code of libraries.
SMALL = dict(
    model_type="llama", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
)


@dataclass(frozen=True)
class Variant:
    """A method with its options.

    Attributes:
        title: Its name in tables.
        method: A name of :data:`s2ft.reproduce.methods.METHODS`.
        options: Options of the method.
        at_least_one: Whether ratios of S²FT that select no unit are raised to the smallest that selects one.
    """

    title: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    at_least_one: bool = False


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: A folder, a config file, a .gguf file, a name on the hub, or the fields of a config.
        variants: The methods.
        batches: Numbers of rows.
        lengths: Numbers of tokens of a row.
        dtype: Dtype of the weights.
        rounds: Processes of each method and shape.
        steps: Measured steps of each process.
        warmup: Steps before them.
        device: "cpu" or "cuda"; None is the GPU if there is one.
        checkpointing: Whether activations are computed again in the backward pass.
        limit_bytes: Memory that a cell may take. On the CPU it is at most nine tenths of
            what is free.
    """

    model: Model
    variants: Sequence[Variant]
    batches: Sequence[int]
    lengths: Sequence[int]
    dtype: str = "bfloat16"
    rounds: int = 3
    steps: int = 5
    warmup: int = 2
    device: str | None = None
    checkpointing: bool = False
    limit_bytes: int | None = None


def efficiency(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure every method on every shape.

    Args:
        plan: What is measured.

    Yields:
        A row for each method and shape when it is known: `method`, `options`, `batch`, `length`, `trained`,
        `status` ("ok" or "OOM"), and if it is ok the medians `forward_ms`, `backward_ms`, `update_ms` and `step_ms`,
        `steps_ms` of every measured step, and `peak_bytes`, the largest over the rounds.

    Raises:
        ValueError: The plan has nothing to measure, or a method does not take its options. It is raised before
            anything is measured.
        RuntimeError: A step failed for another reason than memory.

    Example:
        >>> from s2ft.reproduce.studies.efficiency import Plan, Variant, efficiency
        >>> tiny = dict(model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...             num_attention_heads=2)
        >>> plan = Plan(tiny, [Variant("S²FT", "s2ft", {"d_ratio": 0.1})], [2], [8], "float32", rounds=1, steps=1)
        >>> [(row["method"], row["status"], row["trained"]) for row in efficiency(plan)]
        [('S²FT', 'ok', 48)]
    """
    for name in ("variants", "batches", "lengths"):
        if not getattr(plan, name):
            raise ValueError(f"{name} must have at least one entry, got none")
    config = config_of(plan.model)
    device = plan.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [(variant, _checked(config, variant, plan.dtype)) for variant in plan.variants]
    for length in plan.lengths:
        for batch in plan.batches:
            cells = {
                variant.title: Cell(
                    config, variant.method, options, batch, length, plan.dtype, device,
                    plan.steps, plan.warmup, plan.checkpointing,
                )
                for variant, options in chosen
            }  # fmt: skip
            found = _in_turn(cells, plan)
            for variant, options in chosen:
                row = {"method": variant.title, "options": options, "batch": batch, "length": length, "device": device}
                yield {**row, **_summary(found[variant.title])}


def _checked(config: Any, variant: Variant, dtype: str) -> dict[str, Any]:
    """Return the options of a method for this model, after a trial without weights."""
    if variant.method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {variant.method!r}")
    hollow = random_model(config, dtype, "meta")
    options = {**METHODS[variant.method].defaults, **variant.options}
    if variant.method == "s2ft":
        if variant.at_least_one:
            options = at_least_one_unit(hollow, options)
        s2ft.plan(hollow, S2FTConfig(**options))
    elif variant.method not in ("full", "shira"):  # SHiRA can't be made without weights
        prepare(hollow, variant.method, options)
    return options


def _in_turn(cells: Mapping[str, "Cell"], plan: Plan) -> dict[str, list[dict[str, Any]] | str]:
    """Measure the methods of one shape in turn. A method that has no memory once is not tried again."""
    found: dict[str, Any] = {title: [] for title in cells}
    for number in range(plan.rounds):
        titles = list(cells)
        for title in titles[number % len(titles) :] + titles[: number % len(titles)]:
            if found[title] == OOM:
                continue
            cell = cells[title]
            limits = _limits(cell.device, plan.limit_bytes)
            try:
                found[title].append(in_own_process(measure, cell, limits["gpu"], limit_bytes=limits["cpu"]))
            except OutOfMemory as error:
                logger.info("%s, %d × %d tokens: out of memory (%s)", title, cell.batch, cell.length, error.reason)
                found[title] = OOM
    return found


def _summary(runs: list[dict[str, Any]] | str) -> dict[str, Any]:
    if isinstance(runs, str):
        return {"status": runs}
    steps = [step for run in runs for step in run["steps"]]
    row = {"status": "ok", "trained": runs[0]["trained"], "peak_bytes": max(run["peak_bytes"] for run in runs)}
    for place, part in enumerate(PARTS):
        row[f"{part}_ms"] = milliseconds([step[place] for step in steps])
    row["step_ms"] = milliseconds([sum(step) for step in steps])
    row["steps_ms"] = [round(1000 * sum(step), 3) for step in steps]
    return row


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


def measure(cell: Cell, limit_bytes: int | None = None) -> dict[str, Any]:
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


def _train(cell: Cell, memory: "PeakMemory | None" = None) -> tuple[list[tuple[float, ...]], int]:
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
    moments = [_now(device)]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    moments.append(_now(device))
    loss.backward()
    moments.append(_now(device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    moments.append(_now(device))
    return tuple(after - before for before, after in zip(moments, moments[1:]))


def _now(device: str) -> float:
    wait(device)
    return time.perf_counter()


class PeakMemory:
    """The peak memory of this process, or of a GPU, above what it was when the object was made.

    Args:
        device: "cpu" or "cuda".
        limit_bytes: Memory of the GPU that this process may take; an allocation above it fails.
    """

    def __init__(self, device: str, limit_bytes: int | None = None) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.init()
            if limit_bytes is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
        self.before = torch.cuda.memory_allocated() if device == "cuda" else size_of_process("VmRSS")

    def forget_peak(self) -> None:
        """Begin to watch for a peak now. Only Linux can forget the peak of a process."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak in bytes since :meth:`forget_peak`."""
        return (torch.cuda.max_memory_allocated() if self.device == "cuda" else size_of_process("VmHWM")) - self.before


def _limits(device: str, limit_bytes: int | None) -> dict[str, int | None]:
    """The memory that a cell may take. On the CPU it is never more than what is free, so that nothing else is ended."""
    if device == "cuda":
        return {"gpu": limit_bytes, "cpu": None}
    free = free_bytes()
    known = [limit for limit in (limit_bytes, None if free is None else int(0.9 * free)) if limit is not None]
    return {"gpu": None, "cpu": min(known, default=None)}
