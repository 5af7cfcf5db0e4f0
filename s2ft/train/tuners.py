"""Ways to fine-tune: S²FT by s2ft, others as PEFT makes them, and full fine-tuning, all trained by one trainer.

The table is for comparisons: `s2ft compare` and the experiments of bench/ give each the same rows, batches and loss.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

import s2ft
from s2ft.config import S2FTConfig, refuse
from s2ft.packages import check_packages
from s2ft.text.evaluation import HeldOut
from s2ft.text.generation import contiguous_head
from s2ft.text.prompts import pad_id
from s2ft.train.arguments import SFTArguments
from s2ft.train.batching import choose_batching, short_row
from s2ft.train.fit import JsonlLog, checkpointing, loss_for
from s2ft.train.options import RunOptions, with_default_ratio
from s2ft.train.output import read_log
from s2ft.train.trainers import SFTRunTrainer, TokenRowTrainer

# The projections that the S²FT paper trains with LoRA: q, k, v, up and down.
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Tuner:
    """A way to fine-tune a model.

    Attributes:
        title: Its name in tables.
        config: Name of its configuration class in PEFT, or None if PEFT does not have the method.
        defaults: Options of that class.
        size: The option that sets the number of trained parameters, or None if nothing sets it.
        rate: The best peak learning rate of those measured on word problems with SmolLM2-135M. See
            :func:`default_rate`. That of S²FT follows from the slices.
    """

    title: str
    config: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    size: str | None = None
    rate: float = 1e-3


OF_SMOLLM2 = 0.19 * 576**0.5  # size of the weights of SmolLM2-135M times the root of its width
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": TARGETS}
TUNERS: dict[str, Tuner] = {
    "s2ft": Tuner("S²FT", size="budget"),
    "lora": Tuner("LoRA", "LoraConfig", LORA, "r"),
    "dora": Tuner("DoRA", "LoraConfig", {**LORA, "use_dora": True}, "r", 2e-3),
    "rslora": Tuner("rsLoRA", "LoraConfig", {**LORA, "use_rslora": True}, "r"),
    "shira": Tuner("SHiRA", "ShiraConfig", {"r": 16, "target_modules": TARGETS}, "r", 2e-3),
    "miss": Tuner("MiSS", "MissConfig", {"r": 16, "target_modules": TARGETS}, "r", 5e-4),
    "full": Tuner("full fine-tuning", rate=3e-5),
}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained by one method.

    Attributes:
        model: The model to run. For a method of PEFT it is a PeftModel around the base.
        base: The model that was given, whose layers the method has changed.
        method: Name of the method.
        options: All options of the method, JSON values.
        trainable: Number of trained parameters.
    """

    model: nn.Module
    base: nn.Module
    method: str
    options: dict[str, Any]
    trainable: int


def default_rate(method: str, width: int, size: float) -> float:
    """Return the peak learning rate from which a search for another method than S²FT can start.

    It is in proportion to the size of an output, the root of the width times the size of the weights, as that of S²FT.

    Args:
        method: A name of :data:`TUNERS`.
        width: Width of the model.
        size: Root mean square of the weights, see :func:`s2ft.attached.learning_rate.weight_size`.
    """
    return TUNERS[method].rate * size * width**0.5 / OF_SMOLLM2


def prepare(
    model: nn.Module,
    method: str,
    options: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    calibration: Iterable[Any] | None = None,
    **more: Any,
) -> Prepared:
    """Give a model the trainable parameters of a method, in place.

    The random choices of a method (which units, which weights, how an adapter begins) follow from the seed.

    Args:
        model: A causal language model of transformers, without adapters.
        method: A name of :data:`TUNERS`.
        options: Options of the method that differ from its defaults: fields of S2FTConfig for "s2ft", else arguments
            of PEFT's configuration class. `autocast_adapter_dtype` is the argument of PEFT's get_peft_model: True
            keeps the adapters of a bfloat16 model in float32, which is PEFT's default.
        seed: Seed of the method.
        calibration: Batches for selections of S²FT that need data.
        **more: More arguments of :func:`s2ft.attach`.

    Returns:
        The model, ready to train.

    Raises:
        ValueError: There is no such method, or it does not take an option.
        MissingPackages: PEFT is needed and not installed.
    """
    check_tuner(method)
    options = {**TUNERS[method].defaults, **(options or {})}
    if method == "s2ft":
        report = s2ft.attach(model, s2ft_config({"seed": seed, **options}, model), calibration=calibration, **more)
        return Prepared(model, model, method, options, report.trainable)
    if method == "full":
        check_no_options(options)
        wrapped = model.requires_grad_(True)
    else:
        wrapped = with_peft(model, method, options, seed)
    return Prepared(wrapped, model, method, options, sum(p.numel() for p in wrapped.parameters() if p.requires_grad))


def check_tuner(method: str) -> None:
    if method not in TUNERS:
        raise ValueError(f"method must be one of {', '.join(TUNERS)}, got {method!r}")


def check_no_options(options: dict[str, Any]) -> None:
    refuse((options, f"full fine-tuning takes no options, got {', '.join(options)}"))


def s2ft_config(options: dict[str, Any], model: nn.Module) -> S2FTConfig:
    try:
        return with_default_ratio(S2FTConfig(**options), model)
    except TypeError as error:
        raise ValueError(f"an option of method s2ft is no field of S2FTConfig: {error}") from None


def with_peft(model: nn.Module, method: str, options: dict[str, Any], seed: int, meta: bool = False):
    check_packages("s2ft.peft")
    import peft

    options = dict(options)
    autocast = options.pop("autocast_adapter_dtype", True)
    if method == "shira":
        options.setdefault("random_seed", seed)
    if not isinstance(options["target_modules"], str):  # "all-linear" is one, or a regular expression
        options["target_modules"] = list(options["target_modules"])
    try:
        config = getattr(peft, TUNERS[method].config)(task_type="CAUSAL_LM", **options)
    except TypeError as error:
        raise ValueError(f"method {method} does not take an option: {error}") from None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast, low_cpu_mem_usage=meta)


# ---- training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedRun:
    """What a training has measured.

    Attributes:
        losses: The training loss of each logged step.
        seconds: Time of the training, with its evaluations.
        seconds_per_step: Median time of an update.
        tokens_per_second: Tokens without padding, over the whole training.
        updates: Number of updates.
        best_step: The step with the smallest loss on the held-out rows, whose parameters the model then has, or None.
    """

    losses: list[float]
    seconds: float
    seconds_per_step: float
    tokens_per_second: float
    updates: int
    best_step: int | None = None


def train_rows(
    prepared: Prepared,
    tokenizer: Any,
    rows: Any,
    arguments: SFTArguments,
    *,
    held_out: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    options: RunOptions = RunOptions(),
) -> TrainedRun:
    """Train a prepared model, which keeps what it has learned. Nothing but a log is written.

    All tuners get the same trainer, collator and loss, so that their times and results compare.

    Args:
        prepared: The model, as :func:`prepare` returns it.
        tokenizer: The model's tokenizer.
        rows: The token rows, a Dataset with the columns input_ids and labels.
        arguments: The arguments of the run.
        held_out: Such rows to evaluate on while training, or None.
        callbacks: More callbacks of the Trainer.
        options: Options that the arguments do not have, such as `chunked_loss`.

    Returns:
        Times and losses.

    Raises:
        ValueError: The arguments do not fit the data or the model.
    """
    base, timer, log = prepared.base, _StepTimer(), Path(arguments.output_dir) / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    batching = choose_batching(base, pad_id(tokenizer), rows, arguments)
    kind = SFTRunTrainer if prepared.method == "s2ft" else TokenRowTrainer
    with (
        contiguous_head(base),
        loss_for(base, arguments, options, batching.collator([short_row(rows)])),
        checkpointing(base, arguments),
    ):
        trainer = kind(
            prepared.model,
            arguments,
            batching.prepare(rows, arguments),
            batching,
            tokenizer=tokenizer,
            held_out=None if held_out is None else HeldOut(held_out),
            callbacks=[JsonlLog(log), timer, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        try:
            trainer.train()
        finally:
            trainer.restore_model()
        seconds = time.perf_counter() - start
    losses = [line["loss"] for line in read_log(log) if "loss" in line]
    speed = trainer.state.num_input_tokens_seen / seconds
    return TrainedRun(losses, seconds, median(timer.times), speed, len(timer.times))


class _StepTimer(TrainerCallback):
    """Measures the time of each update, without evaluations."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter() - self.began)
