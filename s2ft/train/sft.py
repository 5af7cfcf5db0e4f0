"""Train an attached model on token rows by TRL's SFTTrainer, and save its adapter."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import s2ft
from s2ft.adapter.saving import gather_trained
from s2ft.attached.record import attachment_of
from s2ft.distributed import all_ranks, check_all_ranks_agree, run_on_ranks
from s2ft.packages import check_packages
from s2ft.text.divergence import Drift
from s2ft.text.evaluation import Comparison, HeldOut
from s2ft.text.generation import contiguous_head
from s2ft.text.prompts import pad_id
from s2ft.train.loss import chunked_loss, why_not_chunked
from s2ft.train.options import RunOptions
from s2ft.train.output import RunFolder, log_failure, newest_valid, plot_loss, read_log, write_json
from s2ft.train.parallel import check_divided_rows, devices_of, is_spread, rows_of_update, run_where_weights_are

logger = logging.getLogger(__name__)
FEW_STEPS = 10  # a warning is logged for a run with fewer updates
MEASURED = tuple(one.name for one in fields(Drift))
OF_IMAGES = ("image", "images", "pixel_values")


@dataclass(frozen=True)
class Finetuned:
    """The result of a run. The trained adapter is also in the model.

    Attributes:
        steps: Number of updates, including those before a resume.
        loss: Mean loss of the last tenth of the logged steps.
        seconds: Time of this process, from where it resumed.
        adapter: Folder of the saved adapter.
        tokens_per_second: Tokens that this process trained on in a second, over all devices, without padding.
        finished: False if `stop_after` or Ctrl-C ended the run.
        best_step: The step whose adapter was saved, if that is the one with the best evaluation, else None.
        reward: Mean reward of the last tenth of the logged steps, or None if nothing was rewarded.
        drift: Forgetting and divergence of the adapter, as far as a meter measured them.
        stopped_at: The step at which a limit of the meter ended the run, or None.
        kept_step: The step whose adapter was saved then, or None.
        interrupted: Whether Ctrl-C ended the run.
        comparison: The base and the adapter on the held-out rows, or None.
    """

    steps: int
    loss: float
    seconds: float
    adapter: Path
    tokens_per_second: float
    finished: bool
    best_step: int | None = None
    reward: float | None = None
    drift: Drift | None = None
    stopped_at: int | None = None
    kept_step: int | None = None
    interrupted: bool = False
    comparison: Comparison | None = None

    def to_dict(self) -> dict:
        """The result as values that JSON can hold."""
        speed = {"seconds": round(self.seconds, 2), "tokens_per_second": round(self.tokens_per_second, 1)}
        more = {"best_step": self.best_step, "reward": self.reward, **(self.drift.to_dict() if self.drift else {})}
        more["comparison"] = self.comparison and self.comparison.to_dict()
        found = {**speed, **more, "stopped_at": self.stopped_at, "kept_step": self.kept_step}
        return {"steps": self.steps, "loss": self.loss, **{key: one for key, one in found.items() if one is not None}}


def sft(
    model,
    tokenizer,
    train,
    arguments,
    folder: RunFolder,
    *,
    options: RunOptions = RunOptions(),
    resume: bool | Path = False,
    held_out: HeldOut | None = None,
    meter: Any = None,
) -> Finetuned:
    """Train the attached adapter of a model by TRL's SFTTrainer, and save it.

    The adapter is saved as soon as it is trained. The report, the last evaluation and the plot follow. An error in one
    of them is logged and does not end the run. Under torchrun or accelerate each rank calls this function with the
    same arguments, and the first rank writes the files.

    Args:
        model: A causal language model with a trainable adapter.
        tokenizer: The model's tokenizer.
        train: The token rows, a Dataset with the columns input_ids and labels.
        arguments: The SFTArguments of the run.
        folder: The output folder. The adapter is saved to `folder.adapter`.
        options: Options that TRL's arguments do not have.
        resume: Continue from the newest valid checkpoint, or from the start if there is none. A path names another
            checkpoint of the run.
        held_out: Data to evaluate on, or None.
        meter: A :class:`~s2ft.train.forgetting.ForgettingMeter`, or None.

    Returns:
        The loss, the time and the folder of the adapter.

    Raises:
        ValueError: The arguments do not fit the data, the model or the installed packages.
        MissingPackages: A package that the run needs is not installed.
    """
    from s2ft.train.batching import short_row

    trainer = trainer_for(model, tokenizer, train, arguments, folder, options, held_out)
    example = trainer.data_collator([short_row(train)])
    with contiguous_head(model), loss_for(model, arguments, options, example):
        return run_trainer(trainer, model, arguments, folder, resume, meter)


def run_trainer(trainer, model, arguments, folder: RunFolder, resume: bool | Path, meter: Any = None) -> Finetuned:
    """Train, save the adapter, write the report, evaluate, and draw the plot.

    Args:
        trainer: A Trainer with the callbacks of :func:`callbacks_of`.
        model: The model, with the adapter.
        arguments: The arguments of the run.
        folder: The output folder.
        resume: As in :func:`sft`.
        meter: A :class:`~s2ft.train.forgetting.ForgettingMeter` that is not among the callbacks yet, or None.
    """
    from transformers.trainer_callback import PrinterCallback

    checkpoint = None
    if resume:
        checkpoint = resume if isinstance(resume, Path) else newest_valid(folder.path)
        logger.info("resuming from %s", checkpoint.name if checkpoint else "the start: there is no valid checkpoint")
    trainer.remove_callback(PrinterCallback)  # JsonlLog shows the same values
    if meter is not None:
        meter.add_to(trainer)
    with checkpointing(model, arguments), restored(model, trainer):
        result = _train_and_save(trainer, model, folder, checkpoint, meter)
    if trainer.is_world_process_zero():
        with log_errors(f"{folder.plot} was not drawn"):
            check_packages("loss.png")
            plot_loss(folder.log, folder.plot, folder.title())
    trainer.accelerator.wait_for_everyone()
    return result


def _train_and_save(trainer, model, folder: RunFolder, checkpoint: Path | None, meter: Any) -> Finetuned:
    """Train, save the adapter, write the report, and evaluate unless the log has an evaluation of the last step."""
    from accelerate.utils import broadcast_object_list

    from s2ft.train.callbacks import Stop

    seen = 0 if checkpoint is None else _state_of(checkpoint).num_input_tokens_seen
    start = time.perf_counter()
    stop = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Stop))
    with stop.listening(trainer.args):
        _train(trainer, checkpoint)
    seconds = time.perf_counter() - start
    stopped = trainer.state.global_step < trainer.state.max_steps and stop.stops_at(trainer.state.global_step)
    finished = not stopped or (meter is not None and meter.stopped_at is not None)
    if finished:
        _save(model, folder, trainer)
    result = _result(trainer, folder, seconds, seen, finished, meter)
    result = replace(result, interrupted=stopped and stop.is_interrupted)
    if finished and trainer.is_world_process_zero():
        with log_errors(f"{folder.report} was not written"):
            write_json(folder.report, result.to_dict())
    if finished and trainer.eval_dataset is not None and result.best_step is None:
        lines = [line for line in read_log(folder.log) if "eval_loss" in line]
        evaluated = [any(line["step"] == trainer.state.global_step for line in lines)]
        if not broadcast_object_list(evaluated)[0]:  # the first rank reads the log and tells the others
            trainer.evaluate()
    return result


def _result(trainer, folder: RunFolder, seconds: float, seen: int, finished: bool, meter: Any) -> Finetuned:
    lines = read_log(folder.log)
    best = _best_step(trainer)
    stopped, kept = (None, None) if meter is None else (meter.stopped_at, best or meter.kept_step)
    return Finetuned(
        trainer.state.global_step,
        _last_mean(lines, "loss") or 0.0,
        seconds,
        folder.adapter,
        (trainer.state.num_input_tokens_seen - seen) / seconds,
        finished,
        best,
        _last_mean(lines, "reward"),
        _drift(meter, lines, best or kept),
        stopped,
        None if stopped is None else kept,
    )


def _drift(meter: Any, lines: list[dict], step: int | None) -> Drift | None:
    """Return the measurement of a step, or else the last one. An earlier process may have logged it."""
    if meter is None:
        return None
    logged = {line["step"]: line for line in lines if "forgetting" in line or "base_kl" in line}
    measured = {number: Drift(**{name: line.get(name) for name in MEASURED}) for number, line in logged.items()}
    measured |= meter.measured
    return measured.get(step, measured[max(measured)] if measured and step is None else None)


def _last_mean(lines: list[dict], name: str) -> float | None:
    """The mean of a value over the last tenth of its lines, or None without any."""
    values = [line[name] for line in lines if line.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last) if last else None


def _best_step(trainer) -> int | None:
    """Return the step of the best checkpoint if its adapter was loaded at the end, and log it."""
    best = trainer.state.best_model_checkpoint
    if not trainer.args.load_best_model_at_end or best is None:
        return None
    step = int(Path(best).name.rpartition("-")[2])
    if trainer.is_world_process_zero():
        name, value = trainer.args.metric_for_best_model, trainer.state.best_metric
        logger.info("the adapter is that of the best evaluation, step %d: %s %.4f", step, name, value)
    return step


def _train(trainer, checkpoint: Path | None) -> None:
    """Train to the last step. An error after it, such as one of a logger, is logged, so that the adapter is saved."""
    state = None if checkpoint is None else _state_of(checkpoint)
    if state is not None and 0 < state.max_steps <= state.global_step:  # the Trainer would train one more step
        _take_over(trainer, checkpoint, state)
        return
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        # With several ranks, others may wait for this one, so the run cannot continue.
        if trainer.args.world_size > 1 or not 0 < trainer.state.max_steps <= trainer.state.global_step:
            raise
        log_failure("all steps are trained, but the trainer failed after the last one", error)


def _take_over(trainer, checkpoint: Path, state) -> None:
    """Put the model and the Trainer into the state after the last step."""
    from s2ft.train.trainer import restore_adapter

    trainer.state = state
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    restore_adapter(trainer.accelerator.unwrap_model(trainer.model), best or checkpoint)


def _save(model, folder: RunFolder, trainer) -> None:
    trained = gather_trained(model)  # on each rank, since a sharded adapter is spread over all of them
    save = partial(s2ft.save_adapter, model, folder.adapter, state=trained)
    run_on_ranks("saving the adapter of the run", all_ranks(), trainer.is_world_process_zero(), save)


@contextlib.contextmanager
def log_errors(failure: str) -> Iterator[None]:
    """Log an error that is raised inside the context, with `failure` and the reason, and continue."""
    try:
        yield
    except Exception as error:
        log_failure(failure, error)


def trainer_for(
    model,
    tokenizer,
    train,
    arguments,
    folder: RunFolder,
    options: RunOptions = RunOptions(),
    held_out: HeldOut | None = None,
):
    """Make the Trainer of a run, with its callbacks. The arguments are those of :func:`sft`."""
    from s2ft.train.batching import choose_batching
    from s2ft.train.trainers import SFTRunTrainer, needs_trl_loss

    check_run(model, train, arguments)
    batching = choose_batching(model, pad_id(tokenizer), train, arguments, needs_trl_loss(arguments))
    rows = batching.prepare(train, arguments)
    callbacks = callbacks_of(arguments, folder, options)
    trainer = SFTRunTrainer(
        model, arguments, rows, batching, tokenizer=tokenizer, held_out=held_out, callbacks=callbacks
    )
    if trainer.is_world_process_zero():
        logger.info(batching.line(len(train), len(rows)))
        log_length(trainer.args, len(rows))
    return trainer


def callbacks_of(arguments, folder: RunFolder, options: RunOptions) -> list[Any]:
    """Make the callbacks of a run: progress, log.jsonl, and when it stops. The arguments are those of :func:`sft`."""
    from transformers import EarlyStoppingCallback

    from s2ft.train.callbacks import EvaluateAfterSaving, JsonlLog, Stop

    callbacks: list[Any] = [JsonlLog(folder.log), Stop(options.stop_after)]
    if not arguments.load_best_model_at_end:
        callbacks.append(EvaluateAfterSaving())
    if options.early_stopping_patience:
        arguments.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold))
    return callbacks


def check_run(model, train, arguments) -> None:
    """Check that a run can work with its rows, its model and this machine. Nothing is written.

    Args:
        model: The model, whose dtype is used.
        train: The token rows.
        arguments: The SFTArguments.

    Raises:
        ValueError: The rows have images, the dtype does not work here, or devices are
            to divide rows that can't be divided.
        MissingPackages: See :func:`check_packages_of_run`.
    """
    check_packages_of_run(arguments)
    columns = train.column_names or ()
    images = [name for name in OF_IMAGES if name in columns]
    if images:
        raise ValueError(
            f"the rows have images (column {images[0]!r}), which s2ft sft does not train on: use S2FTTrainer or TRL's "
            "SFTTrainer with AdapterCheckpoints, see docs/howto/images.md"
        )
    check_dtype(model, arguments)
    check_divided_rows(model, arguments)


def check_dtype(model, arguments) -> None:
    """Check that the dtype of a model works here, and turn on the loss scaler of float16."""
    half = next(model.parameters()).dtype == torch.float16
    if (half or arguments.fp16) and not torch.cuda.is_available():
        raise ValueError("training in float16 needs a GPU: set dtype to bfloat16 or float32, and fp16 to false")
    arguments.fp16 = arguments.fp16 or half


@contextlib.contextmanager
def loss_for(model, arguments, options: RunOptions, batch: dict) -> Iterator[None]:
    """Use the chunked loss inside the context if the options ask for it and it equals the model's own loss.

    Otherwise the model's own loss is used, and the reason is logged. TRL's own loss, if the arguments ask for it,
    replaces both.
    """
    from s2ft.train.trainers import needs_trl_loss

    reason = "this was asked for"
    if needs_trl_loss(arguments):
        reason = "TRL computes it"
    elif options.chunked_loss:
        batch = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
        }
        reason = _why_not_chunked(model, arguments, batch)
        if reason and arguments.process_index == 0:
            logger.info("the loss keeps the logits: %s", reason)
    with contextlib.nullcontext() if reason else chunked_loss(model, in_evaluation=True):
        yield


def _why_not_chunked(model, arguments, batch: dict) -> str:
    """Return why the chunked loss can't be used, the same on all devices, or an empty string."""
    if arguments.torch_compile:
        return "the model is compiled as a whole"
    if is_spread(model):
        return "the weights are spread over the devices"
    return run_where_weights_are("the trial of the loss", model, lambda: why_not_chunked(model, batch))


@contextlib.contextmanager
def restored(model, trainer) -> Iterator[None]:
    """Undo at the end what TRL's loss and NEFTune change in the model, after an error too."""
    try:
        yield
    finally:
        trainer.restore_model()
        handle = getattr(trainer, "neftune_hook_handle", None)
        if handle is not None:
            handle.remove()
            model.get_input_embeddings().__dict__.pop("neftune_noise_alpha", None)


def _state_of(checkpoint: Path):
    from transformers.trainer import TRAINER_STATE_NAME, TrainerState

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def this_rank():
    """Join the launched processes and return accelerate's state, which has the rank of this one.

    Without a GPU, accelerate needs `cpu=True`. Otherwise each process would have rank 0, and all would write to the
    same folder.
    """
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def check_ranks_agree(model) -> None:
    """Check that all ranks train the same units, since statistics may round differently on different devices.

    Raises:
        RuntimeError: The ranks have selected different units. It is raised on each rank.
    """
    check_all_ranks_agree("selection", attachment_of(model).selection.digest)


@contextlib.contextmanager
def checkpointing(model, arguments) -> Iterator[None]:
    """Turn on activation checkpointing inside the context if the arguments ask for it.

    Blocks then keep only their inputs, and compute the rest again in the backward pass.
    """
    if not is_checkpointed(arguments):
        yield
        return
    given = getattr(arguments, "activation_checkpointing_kwargs", None) or arguments.gradient_checkpointing_kwargs
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(
        **{f"{kind}_checkpointing_kwargs": {"use_reentrant": False, **(given or {})}}
    )
    if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # not needed, and the backward pass would continue down to the embeddings
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def is_checkpointed(arguments) -> bool:
    """Return whether the arguments ask for activation checkpointing, which has two names in transformers."""
    return bool(arguments.gradient_checkpointing or getattr(arguments, "activation_checkpointing", False))


def smaller_step(arguments) -> str:
    """Return the options with which a step of a run takes less memory.

    Args:
        arguments: The arguments of a Trainer.
    """
    if not is_checkpointed(arguments):
        return "--gradient-checkpointing"
    batch, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    if batch == 1:
        return "--load-in-4bit or a smaller --max-length"
    half = batch // 2 if batch % 2 == 0 else 1
    return f"--per-device-train-batch-size {half} --gradient-accumulation-steps {accumulation * (batch // half)}"


def check_packages_of_run(arguments) -> None:
    """Check that the packages of a run are installed: those of training, of the optimizer, and of loggers.

    Args:
        arguments: The SFTArguments.

    Raises:
        MissingPackages: Names the packages that are missing and the line that installs them.
        ValueError: transformers does not know a logger, or cannot use it here.
    """
    check_packages("s2ft sft")
    check_packages(f"optimizer {getattr(arguments.optim, 'value', arguments.optim)}")
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    loggers = [name for name in arguments.report_to or [] if name != "none"]
    get_reporting_integration_callbacks(loggers)  # ValueError for an unknown name
    for name in loggers:
        check_packages(f"report_to {name}")
        if name not in (*get_available_reporting_integrations(), "flyte"):  # transformers omits flyte
            raise ValueError(f"report_to: transformers can't use {name} with its present installation and settings")


def updates(arguments, rows: int) -> int:
    """Return the number of updates of a run on so many rows or packs."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / (arguments.train_batch_size * devices_of(arguments).groups))
    each = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(each * arguments.num_train_epochs)


def log_length(arguments, rows: int) -> None:
    """Log a warning about a run with few updates."""
    steps = updates(arguments, rows)
    if arguments.max_steps <= 0 and steps < FEW_STEPS:
        logger.warning(
            "warning: %d %s at batch size %d and %g epochs are %d update%s, which may be too few to learn "
            "anything: lower --batch-size, or raise --epochs",
            rows,
            "packs" if getattr(arguments, "packing", False) else "rows",
            rows_of_update(arguments),
            arguments.num_train_epochs,
            steps,
            "" if steps == 1 else "s",
        )
