"""One training run of an attached model, from token rows to a saved adapter."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import s2ft
from s2ft.adapter.store import gathered
from s2ft.attached.record import attachment_of
from s2ft.distributed import check_all_ranks_agree
from s2ft.packages import check_packages
from s2ft.text.encoding import AnswerCollator, TokenRow
from s2ft.text.head import packed_head
from s2ft.text.prompts import pad_id
from s2ft.train.checkpoints import last_whole
from s2ft.train.evaluate import HeldOut
from s2ft.train.loss import chunked_loss, why_not
from s2ft.train.options import TrainOptions
from s2ft.train.output import RunFolder, log_failure, read_log, write_json

logger = logging.getLogger(__name__)
FEW_STEPS = 10  # a run of fewer updates gets a warning


@dataclass(frozen=True)
class Finetuned:
    """What a run gave; the adapter is also in the model. Speed and time are of this process, from where it resumed."""

    steps: int
    loss: float  # mean of the last tenth of the logged steps
    seconds: float
    adapter: Path
    tokens_per_second: float  # over all devices, padding not counted
    finished: bool  # False where stop_after ended it

    def to_dict(self) -> dict:
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
    """Train the attached adapter of `model` on `rows` and save it to `folder.adapter`.

    `resume` goes on from the newest whole checkpoint, or from the start where there is none yet.
    Under torchrun or accelerate every rank calls this with the same arguments; the first one writes.
    The adapter is saved as soon as it is trained. Report, last evaluation and plot come after it, and one that fails
    is logged.
    """
    checkpoint = last_whole(folder.path) if resume else None
    if resume:
        logger.info("resuming from %s", checkpoint.name if checkpoint else "the start: there is no whole checkpoint")
    trainer = trainer_for(model, tokenizer, rows, options, folder, held_out)
    seen = 0 if checkpoint is None else _tokens_seen(checkpoint)
    if trainer.is_world_process_zero():
        say_length(options, len(rows))
    start = time.perf_counter()
    with (
        packed_head(model),
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
            with optional(f"{folder.report} was not written"):
                write_json(folder.report, result.to_dict())
        if finished and held_out is not None and not _is_evaluated(trainer, folder):
            trainer.evaluate()
    if trainer.is_world_process_zero():
        _plot(folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _train(trainer, checkpoint: Path | None) -> None:
    """Train to the last step; then an error, of a logger that can't end say, is logged, and the adapter is saved."""
    from s2ft.train.callbacks import LossBar

    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        # other ranks may be waiting for this one, so that the run can't go on
        if trainer.args.world_size > 1 or not 0 < trainer.state.max_steps <= trainer.state.global_step:
            raise
        log_failure("all steps are trained, but the trainer failed after the last one", error)
    finally:
        next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LossBar)).close()


def _save(model, folder: RunFolder, trainer) -> None:
    trained = gathered(model)  # by every rank: a sharded model's is spread over them
    if trainer.is_world_process_zero():
        s2ft.save_adapter(model, folder.adapter, state=trained)


def _is_evaluated(trainer, folder: RunFolder) -> bool:
    """Whether the log has an evaluation of the last step. The first rank reads it, and all ranks get the same answer."""
    from accelerate.utils import broadcast_object_list

    found = [any("eval_loss" in line and line["step"] == trainer.state.global_step for line in read_log(folder.log))]
    return broadcast_object_list(found)[0]


def _plot(folder: RunFolder) -> None:
    with optional(f"{folder.plot} was not drawn"):
        check_packages("loss.png")
        from s2ft.train.plot import plot_loss

        plot_loss(folder.log, folder.plot, folder.title())


@contextlib.contextmanager
def optional(failure: str) -> Iterator[None]:
    """Log an error as `failure` and its reason, and go on."""
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
    """The Trainer of a run, with its callbacks."""
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
    trainer.remove_callback(PrinterCallback)  # LossBar shows the same
    if options.stop_after:
        trainer.add_callback(StopAfter(options.stop_after))
    return trainer


@contextlib.contextmanager
def loss_for(model, options: TrainOptions, batch: dict) -> Iterator[None]:
    """The fused loss where it is asked for and is the model's own, else the model's own, and the log says why."""
    if not options.chunked_loss:
        yield
        return
    batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    reason = "the model is compiled as a whole" if options.compile else why_not(model, batch)
    if reason:
        logger.info("the loss keeps the logits: %s", reason)
    with contextlib.nullcontext() if reason else chunked_loss(model):
        yield


def _tokens_seen(checkpoint: Path) -> int:
    from transformers.trainer import TRAINER_STATE_NAME, TrainerState

    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).num_input_tokens_seen


def this_rank():
    """accelerate's state: which of the launched processes this is. It joins them, also on CPUs alone, where
    accelerate must be told; else each would take itself for the only one and write to the same folder."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def check_ranks_agree(model) -> None:
    """Every rank chooses its units itself; statistics could in principle round differently on different devices.

    Raises: RuntimeError on every rank, if not all train the same units.
    """
    check_all_ranks_agree("selection", attachment_of(model).selection.digest)


@contextlib.contextmanager
def checkpointing(model) -> Iterator[None]:
    """Blocks keep their inputs only and compute the rest again in backward."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()  # not needed, and with it the backward would go down to the embeddings
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def training_arguments(model, options: TrainOptions, rows: int, folder: RunFolder, evaluates: bool = False):
    """Our options in transformers' words.

    Raises:
        ValueError: Sizes, a dtype, an optimizer or a logger that don't work here; nothing is written.
        MissingPackages: As :func:`check_packages_of_run`.
    """
    check_packages_of_run(options)
    from transformers import TrainingArguments

    half = next(model.parameters()).dtype == torch.float16
    if (half or options.autocast == "float16") and not torch.cuda.is_available():
        raise ValueError("training in float16 needs a GPU: take bfloat16 or float32 for dtype and autocast")
    warmup = options.warmup(options.steps(rows))
    arguments = TrainingArguments(
        output_dir=str(folder.path),
        per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size,
        optim=options.optimizer,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        lr_scheduler_kwargs=options.schedule_arguments(options.steps(rows)),
        warmup_steps=warmup + 1 if warmup else 0,  # RunTrainer leaves out the first, at learning rate 0
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
    # One process trains on one device; several are launched by torchrun or accelerate. nn.DataParallel,
    # which Trainer would choose for several visible devices, copies modules and loses the adapter's state.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.gradient_accumulation_steps = options.accumulation(arguments.world_size)
    return arguments


def check_packages_of_run(options: TrainOptions) -> None:
    """Check that what a run imports is installed: accelerate, the optimizer's package, further loggers.

    Raises:
        MissingPackages: Names the packages that are missing and the line that installs them.
        ValueError: A logger that transformers doesn't know, or can't use here.
    """
    check_packages("s2ft finetune")
    check_packages(f"optimizer {options.optimizer}")
    if not options.report_to:
        return
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    get_reporting_integration_callbacks(list(options.report_to))  # ValueError for one that transformers doesn't know
    for name in options.report_to:
        check_packages(f"report_to {name}")
    available = get_available_reporting_integrations() + ["flyte"]  # which it forgets
    for name in options.report_to:
        if name not in available:
            raise ValueError(f"report_to: transformers can't use {name} here, as it is installed and set up")


def say_length(options: TrainOptions, rows: int) -> None:
    """Log the warm-up where it is shorter than asked for, and warn where the data makes few updates."""
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
