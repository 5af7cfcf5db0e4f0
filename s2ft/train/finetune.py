"""Train an attached model on token rows and save its adapter."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import s2ft
from s2ft.adapter.saving import gather_trained
from s2ft.attached.record import attachment_of
from s2ft.distributed import check_all_ranks_agree
from s2ft.packages import check_packages
from s2ft.text.encoding import AnswerCollator, TokenRow
from s2ft.text.output_head import contiguous_head
from s2ft.text.prompts import pad_id
from s2ft.train.checkpoints import newest_valid
from s2ft.train.held_out import HeldOut
from s2ft.train.loss import chunked_loss, why_not_chunked
from s2ft.train.options import TrainOptions
from s2ft.train.output import RunFolder, log_failure, read_log, write_json

logger = logging.getLogger(__name__)
FEW_STEPS = 10  # a warning is logged for a run with fewer updates


@dataclass(frozen=True)
class Finetuned:
    """The result of a run. The trained adapter is also in the model.

    Attributes:
        steps: Number of updates, including those before a resume.
        loss: Mean loss of the last tenth of the logged steps.
        seconds: Time of this process, from where it resumed.
        adapter: Folder of the saved adapter.
        tokens_per_second: Tokens that this process trained on in a second, over all devices, without padding.
        finished: False if `stop_after` ended the run.
    """

    steps: int
    loss: float
    seconds: float
    adapter: Path
    tokens_per_second: float
    finished: bool

    def to_dict(self) -> dict:
        """The result as values that JSON can hold."""
        return {
            "steps": self.steps,
            "loss": self.loss,
            "seconds": round(self.seconds, 2),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


def finetune(
    model,
    tokenizer,
    rows: Sequence[TokenRow],
    options: TrainOptions,
    folder: RunFolder,
    resume: bool = False,
    held_out: HeldOut | None = None,
) -> Finetuned:
    """Train the attached adapter of a model and save it.

    The adapter is saved as soon as it is trained. The report, the last evaluation and the plot follow. An error in one
    of them is logged and does not end the run. Under torchrun or accelerate each rank calls this function with the
    same arguments, and the first rank writes the files.

    Args:
        model: A causal language model with a trainable adapter.
        tokenizer: The model's tokenizer.
        rows: The training data, see :func:`s2ft.text.encoding.encode_examples`.
        options: The options of the run.
        folder: The output folder. The adapter is saved to `folder.adapter`.
        resume: Continue from the newest valid checkpoint, or from the start if there is none.
        held_out: Data to evaluate on, or None.

    Returns:
        The loss, the time and the folder of the adapter.

    Raises:
        ValueError: The options do not fit the data, the model or the installed packages.
        MissingPackages: A package that the run needs is not installed.
    """
    checkpoint = newest_valid(folder.path) if resume else None
    if resume:
        logger.info("resuming from %s", checkpoint.name if checkpoint else "the start: there is no valid checkpoint")
    trainer = trainer_for(model, tokenizer, rows, options, folder, held_out)
    seen = 0 if checkpoint is None else _tokens_seen(checkpoint)
    if trainer.is_world_process_zero():
        log_length(options, len(rows))
    start = time.perf_counter()
    with (
        contiguous_head(model),
        loss_for(model, options, trainer.data_collator(list(rows[:1]))),
        checkpointing(model) if options.gradient_checkpointing else contextlib.nullcontext(),
    ):
        _train(trainer, checkpoint)
        seconds = time.perf_counter() - start
        finished = trainer.state.global_step >= trainer.state.max_steps
        if finished:
            _save(model, folder, trainer)
        losses = [line["loss"] for line in read_log(folder.log) if "loss" in line]
        last = losses[-max(1, len(losses) // 10) :]
        result = Finetuned(
            trainer.state.global_step,
            sum(last) / max(1, len(last)),
            seconds,
            folder.adapter,
            (trainer.state.num_input_tokens_seen - seen) / seconds,
            finished,
        )
        if finished and trainer.is_world_process_zero():
            with log_errors(f"{folder.report} was not written"):
                write_json(folder.report, result.to_dict())
        if finished and held_out is not None and not _is_evaluated(trainer, folder):
            trainer.evaluate()
    if trainer.is_world_process_zero():
        _plot(folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _train(trainer, checkpoint: Path | None) -> None:
    """Train to the last step. An error after it, such as one of a logger, is logged, so that the adapter is saved."""
    from s2ft.train.callbacks import LossBar

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        # With several ranks, others may wait for this one, so the run cannot continue.
        if trainer.args.world_size > 1 or not 0 < trainer.state.max_steps <= trainer.state.global_step:
            raise
        log_failure("all steps are trained, but the trainer failed after the last one", error)
    finally:
        next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LossBar)).close()


def _save(model, folder: RunFolder, trainer) -> None:
    trained = gather_trained(model)  # on each rank, since a sharded adapter is spread over all of them
    if trainer.is_world_process_zero():
        s2ft.save_adapter(model, folder.adapter, state=trained)


def _is_evaluated(trainer, folder: RunFolder) -> bool:
    """Whether the log has an evaluation of the last step. The first rank reads the log and tells the others."""
    from accelerate.utils import broadcast_object_list

    found = [any("eval_loss" in line and line["step"] == trainer.state.global_step for line in read_log(folder.log))]
    return broadcast_object_list(found)[0]


def _plot(folder: RunFolder) -> None:
    with log_errors(f"{folder.plot} was not drawn"):
        check_packages("loss.png")
        from s2ft.train.plot import plot_loss

        plot_loss(folder.log, folder.plot, folder.title())


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
    rows: Sequence[TokenRow],
    options: TrainOptions,
    folder: RunFolder,
    held_out: HeldOut | None = None,
):
    """Make the Trainer of a run, with its callbacks. The arguments are those of :func:`finetune`."""
    from transformers.trainer_callback import PrinterCallback

    from s2ft.train.callbacks import EvaluateAfterSaving, JsonlLog, LossBar, StopAfter
    from s2ft.train.runs import RunTrainer

    trainer = RunTrainer(
        model=model,
        args=training_arguments(model, options, len(rows), folder, held_out is not None),
        train_dataset=list(rows),
        eval_dataset=list(held_out.rows) if held_out else None,
        data_collator=AnswerCollator(pad_id(tokenizer)),
        callbacks=[LossBar(), JsonlLog(folder.log), EvaluateAfterSaving()],
        tokenizer=tokenizer,
        held_out=held_out,
    )
    trainer.remove_callback(PrinterCallback)  # LossBar shows the same values
    if options.stop_after:
        trainer.add_callback(StopAfter(options.stop_after))
    return trainer


@contextlib.contextmanager
def loss_for(model, options: TrainOptions, batch: dict) -> Iterator[None]:
    """Use the chunked loss inside the context if the options ask for it and it equals the model's own loss.

    Otherwise the model's own loss is used, and the reason is logged.
    """
    if not options.chunked_loss:
        yield
        return
    batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    reason = "the model is compiled as a whole" if options.compile else why_not_chunked(model, batch)
    if reason:
        logger.info("the loss keeps the logits: %s", reason)
    with contextlib.nullcontext() if reason else chunked_loss(model):
        yield


def _tokens_seen(checkpoint: Path) -> int:
    from transformers.trainer import TRAINER_STATE_NAME, TrainerState

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).num_input_tokens_seen


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
def checkpointing(model) -> Iterator[None]:
    """Turn on activation checkpointing inside the context: blocks keep only their inputs and compute the rest again."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # not needed, and the backward pass would continue down to the embeddings
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def training_arguments(model, options: TrainOptions, rows: int, folder: RunFolder, evaluates: bool = False):
    """Convert options to transformers' TrainingArguments. Nothing is written.

    Args:
        model: The model, whose dtype is used.
        options: The options of the run.
        rows: Number of rows of the training data.
        folder: The output folder.
        evaluates: Whether the run has data to evaluate on.

    Raises:
        ValueError: A size, the dtype, the optimizer or a logger does not work here.
        MissingPackages: See :func:`check_packages_of_run`.
    """
    check_packages_of_run(options)
    from transformers import TrainingArguments

    half = next(model.parameters()).dtype == torch.float16
    if (half or options.autocast == "float16") and not torch.cuda.is_available():
        raise ValueError("training in float16 needs a GPU: set dtype and autocast to bfloat16 or float32")
    warmup = options.warmup(options.steps(rows))
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        optim=options.optimizer,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        lr_scheduler_kwargs=options.schedule_arguments(options.steps(rows)),
        warmup_steps=warmup + 1 if warmup else 0,  # RunTrainer skips the first step, whose learning rate is 0
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        use_cpu=not torch.accelerator.is_available(),
        seed=options.data_seed,
        data_seed=options.data_seed,
        fp16=half or options.autocast == "float16",
        bf16=options.autocast == "bfloat16",
        torch_compile=options.compile,
        disable_tqdm=True,
        report_to=options.report_to or "none",
        run_name=folder.path.name,
        remove_unused_columns=False,
        prediction_loss_only=True,
        logging_steps=options.log_steps,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluates and options.eval_steps else "no",
        eval_steps=options.eval_steps or None,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=options.keep_checkpoints or None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # One process trains on one device, and torchrun or accelerate start several processes. With several visible
    # devices Trainer would choose nn.DataParallel, which copies modules and loses the adapter's state.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.gradient_accumulation_steps = options.accumulation(arguments.world_size)
    return arguments


def check_packages_of_run(options: TrainOptions) -> None:
    """Check that the packages of a run are installed: accelerate, the optimizer's package, and those of loggers.

    Raises:
        MissingPackages: Names the packages that are missing and the line that installs them.
        ValueError: transformers does not know a logger, or cannot use it here.
    """
    check_packages("s2ft finetune")
    check_packages(f"optimizer {options.optimizer}")
    if not options.report_to:
        return
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    get_reporting_integration_callbacks(list(options.report_to))  # ValueError for an unknown name
    for name in options.report_to:
        check_packages(f"report_to {name}")
    available = get_available_reporting_integrations() + ["flyte"]  # transformers omits it
    for name in options.report_to:
        if name not in available:
            raise ValueError(f"report_to: transformers can't use {name} with its present installation and settings")


def log_length(options: TrainOptions, rows: int) -> None:
    """Log a warm-up that is shorter than the option, and a warning about a run with few updates."""
    steps = options.steps(rows)
    if options.warmup(steps) < options.warmup_steps:
        logger.info(
            "warm-up is %d step%s instead of %d: at most a tenth of the run's %d",
            options.warmup(steps),
            "" if options.warmup(steps) == 1 else "s",
            options.warmup_steps,
            steps,
        )
    if options.max_steps <= 0 and steps < FEW_STEPS:
        logger.warning(
            "warning: %d rows at batch size %d and %g epochs are %d update%s, which may be too few to learn "
            "anything: lower --batch-size (and --micro-batch-size), or raise --epochs",
            rows,
            options.batch_size,
            options.epochs,
            steps,
            "" if steps == 1 else "s",
        )
