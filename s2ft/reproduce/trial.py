"""One trial: load a model, train it by one method, and measure what it has learned and forgotten."""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import s2ft
from s2ft.config import S2FTConfig
from s2ft.files.writing import replace_file
from s2ft.reproduce.best import KeepBest
from s2ft.reproduce.data import TrialData
from s2ft.reproduce.methods import Prepared, prepare
from s2ft.reproduce.training import Trained, train
from s2ft.text.adapter_prompts import Prompter
from s2ft.text.calibration import calibration_for, needs_calibration
from s2ft.text.divergence import BaseDistributions, mean_loss
from s2ft.text.models import load_model
from s2ft.text.prompts import PromptFormat, prompt_format
from s2ft.text.suites import LoadedTask, TaskResult, average, score_suite
from s2ft.train.arguments import SFTArguments
from s2ft.train.device import gpu_or_cpu
from s2ft.train.held_out import HeldOut
from s2ft.train.options import divide_batch
from s2ft.train.output import RunFolder
from s2ft.train.sft import updates

logger = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A model and what goes with it.

    Attributes:
        model: The base model, on its device.
        tokenizer: Its tokenizer, with the chat template of the prompt.
        prompt: The format of prompts.
    """

    model: Any
    tokenizer: Any
    prompt: PromptFormat


def load(name: str, dtype: str, chat_template: str | None) -> Loaded:
    """Load a model onto the GPU, if there is one.

    Args:
        name: A folder, a name on the hub, or a .gguf file.
        dtype: Dtype of the weights.
        chat_template: A file with a template, its text, or "alpaca". None is the tokenizer's own.

    Raises:
        ValueError: The weights are float16, whose gradients need a loss scaler.
    """
    model, tokenizer = load_model(name, dtype)
    if model.dtype == torch.float16:
        raise ValueError("trials train in bfloat16 or float32, and the weights are float16: set dtype to one of them")
    prompt = prompt_format(tokenizer, chat_template=chat_template)
    prompt.apply_to(tokenizer)
    return Loaded(model.to(gpu_or_cpu()), tokenizer, prompt)


class _Prompter(Prompter):
    """A Prompter with the prompt of a trial, for a model whose adapter records none."""

    def __init__(self, loaded: Loaded) -> None:
        super().__init__(loaded.tokenizer, {"prompt": loaded.prompt.to_dict()}, loaded.model.generation_config)


# ---- training ------------------------------------------------------------------------------------------


def needs_autocast(method: str, model: Any, options: Any) -> bool:
    """Return whether a method keeps float32 weights and computes in the model's dtype.

    Full fine-tuning of bfloat16 weights would round most of its updates away. Adapters are float32 in any case.

    Args:
        method: Name of the method.
        model: The model in its dtype.
        options: Has `full_in_float32`.
    """
    return method == "full" and options.full_in_float32 and model.dtype == torch.bfloat16


@contextmanager
def float32_weights(model: Any) -> Iterator[None]:
    """Make the parameters float32 inside the context, and round them to their dtypes afterwards. Buffers stay."""
    dtypes = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in dtypes:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def trial_arguments(
    options: Any, rows: int, learning_rate: float, seed: int, folder: Path, autocast: bool = False
) -> SFTArguments:
    """Return the arguments of the trainer.

    Args:
        options: The options of the trial, see :class:`~s2ft.reproduce.studies.accuracy.AccuracyOptions`.
        rows: Number of training rows.
        learning_rate: Peak learning rate.
        seed: Seed of the order of the rows and of dropout.
        folder: The folder of the run.
        autocast: Whether float32 weights are computed with in bfloat16.

    Raises:
        ValueError: The warm-up is not shorter than the run, or the rows of an update can't be divided.
    """
    micro, passes = divide_batch(options.batch_size, 1, options.micro_batch_size)
    arguments = SFTArguments(
        output_dir=str(folder),
        learning_rate=learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,  # exactly so many, unlike the default of s2ft sft
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=passes,
        per_device_eval_batch_size=micro,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        max_grad_norm=options.max_grad_norm,
        max_length=options.max_length,
        gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy=options.order,
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=options.eval_steps,
        save_steps=0,
        seed=seed,
        bf16=autocast,
    )
    steps = updates(arguments, rows)
    if options.warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps {options.warmup_steps} must be below the number of updates, and {rows} rows are {steps}: "
            "set warmup_steps to a smaller number"
        )
    arguments.eval_delay = int(options.eval_from * steps)
    return arguments


def prepare_trial(loaded: Loaded, configuration: Mapping[str, Any], data: TrialData, batch: int) -> Prepared:
    """Give the model the trainable parameters of a method.

    Args:
        loaded: The model.
        configuration: `method`, `options` and `seed`.
        data: The training rows, of which a selection may need some.
        batch: Rows of a forward pass of the calibration.
    """
    method, options, seed = configuration["method"], configuration["options"], configuration["seed"]
    calibration = None
    if method == "s2ft":
        config = S2FTConfig(**{"seed": seed, **options})
        if needs_calibration(config):
            calibration = calibration_for(config, loaded.tokenizer, data.train, None, batch)
    prepared = prepare(loaded.model, method, options, seed=seed, calibration=calibration)
    expected = configuration.get("parameters")
    if expected is not None and prepared.trainable != expected:
        raise RuntimeError(f"the plan says that {expected:,} parameters are trained, and {prepared.trainable:,} are")
    return prepared


def train_trial(
    loaded: Loaded, prepared: Prepared, data: TrialData, arguments: SFTArguments, folder: Path, best: bool
) -> tuple[Trained, KeepBest]:
    """Train a prepared model, and give it the parameters of its best evaluation if that is asked for.

    Returns:
        Times and losses, and the best evaluation.
    """
    keeper = KeepBest(prepared.model)
    held_out = HeldOut(data.held_out) if data.held_out is not None and arguments.eval_strategy != "no" else None
    with float32_weights(prepared.model) if arguments.bf16 else nullcontext():
        trained = train(
            prepared,
            loaded.tokenizer,
            data.train,
            arguments,
            RunFolder(folder),
            held_out=held_out,
            callbacks=[keeper] if best else [],
        )
        if best:
            keeper.restore()
    return trained, keeper


def save_trial(prepared: Prepared, loaded: Loaded, folder: Path) -> None:
    """Save the adapter of a method. Full fine-tuning has none, and nothing is written."""
    if prepared.method == "full":
        logger.info("full fine-tuning has no adapter, and its weights are not saved")
    elif prepared.method == "s2ft":
        s2ft.adapter.add_info(prepared.model, {"prompt": loaded.prompt.to_dict()})
        s2ft.save_adapter(prepared.model, folder / "adapter")
    else:
        prepared.model.save_pretrained(folder / "adapter")


# ---- measuring -----------------------------------------------------------------------------------------


class Meter:
    """Measures a model before and after the training on the same rows.

    Args:
        held_out: Held-out token rows of the training data, or None.
        other: Token rows of other text, or None.
        kl: Whether KL(base‖model) is measured on the held-out rows.
        batch_size: Rows of a forward pass.
    """

    def __init__(self, held_out: Any, other: Any, kl: bool, batch_size: int = 8) -> None:
        self.held_out, self.other, self.wants_kl, self.batch_size = held_out, other, kl, batch_size
        self._other_before: float | None = None
        self._base: BaseDistributions | None = None

    def before(self, model: Any) -> None:
        """Measure the base: the model before the training, or with an adapter that has not learned yet.

        Args:
            model: The model.
        """
        if self.other is not None:
            self._other_before = mean_loss(model, self.other, self.batch_size)
        if self.wants_kl:
            self._base = BaseDistributions.of(model, self.held_out, self.batch_size)

    def after(self, model: Any) -> dict[str, float]:
        """Return the losses of the trained model in nats a token, by name.

        Args:
            model: The model.

        Returns:
            `held_out_loss`, `other_loss`, `forgetting` (the rise of the loss on other text) and `kl`, as far as they
            are measured.
        """
        found = {}
        if self.held_out is not None:
            found["held_out_loss"] = mean_loss(model, self.held_out, self.batch_size)
        if self.other is not None:
            found["other_loss"] = mean_loss(model, self.other, self.batch_size)
            found["forgetting"] = found["other_loss"] - self._other_before
        if self._base is not None:
            found["kl"] = self._base.kl(model)
        return found


def score_tasks(
    loaded: Loaded, model: Any, suite: Sequence[LoadedTask], options: Any, folder: Path
) -> dict[str, float]:
    """Score a model on the tasks of a suite, and write its answers.

    Args:
        loaded: The base, for the prompts.
        model: The model to score.
        suite: What :func:`s2ft.text.suites.load_suite` returned.
        options: Has `num_beams`, `eval_batch_size` and `max_new_tokens`.
        folder: The folder of the run; the answers are written to `answers/TASK.jsonl`.

    Returns:
        The accuracy of each task and their average, in percent.
    """

    def write(result: TaskResult) -> None:
        (folder / "answers").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        replace_file(folder / "answers" / f"{result.name}.jsonl", lines.encode())
        logger.info("%s: %.1f %% of %d", result.name, 100 * result.accuracy, result.of)

    found = score_suite(
        model,
        _Prompter(loaded),
        suite,
        num_beams=options.num_beams,
        batch_size=options.eval_batch_size,
        max_new_tokens=options.max_new_tokens,
        on_result=write,
    )
    return {**{result.name: 100 * result.accuracy for result in found}, "average": 100 * average(found)}


@contextmanager
def timed(row: dict[str, Any], name: str):
    """Put the seconds inside the context into a row."""
    start = time.perf_counter()
    yield
    row[name] = round(time.perf_counter() - start, 3)


def reset_gpu_peak() -> None:
    """Begin to measure the largest memory on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> dict[str, int]:
    """Return the largest memory of PyTorch on the GPU since the last reset, in bytes, or nothing without a GPU."""
    return {"gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}
