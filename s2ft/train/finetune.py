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
from s2ft.distributed import check_agree
from s2ft.record import attachment_of
from s2ft.train.checkpoints import last_whole
from s2ft.train.encoding import AnswerCollator, TokenRow
from s2ft.train.evaluate import HeldOut
from s2ft.train.head import packed_head
from s2ft.train.loss import fused_loss, why_not
from s2ft.train.options import TrainOptions
from s2ft.train.output import RunFolder, read_log, write_json
from s2ft.train.prompts import pad_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finetuned:
    """What a run gave; the adapter is also in the model. Speed and time are of this process, from where it resumed."""

    steps: int
    loss: float        # mean of the last tenth of the logged steps
    seconds: float
    adapter: Path
    tokens_per_second: float   # over all devices, padding not counted
    finished: bool             # False where stop_after ended it

    def to_dict(self) -> dict:
        return {"steps": self.steps, "loss": self.loss, "seconds": round(self.seconds, 2),
                "tokens_per_second": round(self.tokens_per_second, 1)}


def finetune(model, tokenizer, rows: Sequence[TokenRow], options: TrainOptions, folder: RunFolder,
             resume: bool = False, held_out: HeldOut | None = None) -> Finetuned:
    """Train the attached adapter of `model` on `rows` and save it to `folder.adapter`.

    `resume` goes on from the newest whole checkpoint, or from the start where there is none yet.
    Under torchrun or accelerate every rank calls this with the same arguments; the first one writes.
    """
    from s2ft.train.plot import plot_loss

    checkpoint = last_whole(folder.path) if resume else None
    if resume:
        logger.info("resuming from %s", checkpoint.name if checkpoint else "the start: there is no whole checkpoint")
    trainer = trainer_for(model, tokenizer, rows, options, folder, held_out)
    seen = 0 if checkpoint is None else _tokens_seen(checkpoint)
    start = time.perf_counter()
    with packed_head(model), loss_for(model, options, trainer.data_collator(list(rows[:1]))), \
            checkpointing(model) if options.gradient_checkpointing else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
        finished = trainer.state.global_step >= trainer.state.max_steps
        if held_out is not None and finished and (not options.eval_steps or trainer.state.global_step % options.eval_steps):
            trainer.evaluate()
    losses = [line["loss"] for line in read_log(folder.log) if "loss" in line]
    last = losses[-max(1, len(losses) // 10):]
    result = Finetuned(trainer.state.global_step, sum(last) / max(1, len(last)), seconds, folder.adapter,
                       (trainer.state.num_input_tokens_seen - seen) / seconds, finished)
    trained = gathered(model)   # by every rank: a sharded model's is spread over them
    if trainer.is_world_process_zero():
        plot_loss(folder.log, folder.plot)
        if finished:
            s2ft.save_adapter(model, folder.adapter, state=trained)
            write_json(folder.report, result.to_dict())
    trainer.accelerator.wait_for_everyone()
    return result


def trainer_for(model, tokenizer, rows: Sequence[TokenRow], options: TrainOptions, folder: RunFolder,
                held_out: HeldOut | None = None):
    """The Trainer of a run, with its callbacks."""
    from transformers.trainer_callback import PrinterCallback

    from s2ft.train.callbacks import JsonlLog, LossBar, StopAfter
    from s2ft.train.scored import ScoredTrainer

    trainer = ScoredTrainer(
        model=model, args=training_arguments(model, options, len(rows), folder, held_out is not None),
        train_dataset=list(rows), eval_dataset=list(held_out.rows) if held_out else None,
        data_collator=AnswerCollator(pad_id(tokenizer)), callbacks=[LossBar(), JsonlLog(folder.log)],
        tokenizer=tokenizer, held_out=held_out)
    trainer.remove_callback(PrinterCallback)   # LossBar shows the same
    if options.stop_after:
        trainer.add_callback(StopAfter(options.stop_after))
    return trainer


@contextlib.contextmanager
def loss_for(model, options: TrainOptions, batch: dict) -> Iterator[None]:
    """The fused loss where it is asked for and is the model's own, else the model's own, and the log says why."""
    if not options.fused_loss:
        yield
        return
    batch = {key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    reason = "the model is compiled as a whole" if options.compile else why_not(model, batch)
    if reason:
        logger.info("the loss keeps the logits: %s", reason)
    with contextlib.nullcontext() if reason else fused_loss(model):
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
    check_agree("selection", attachment_of(model).selection.digest)


@contextlib.contextmanager
def checkpointing(model) -> Iterator[None]:
    """Blocks keep their inputs only and compute the rest again in backward."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"   # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    if hasattr(model, "_require_grads_hooks") or hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()   # not needed, and with it the backward would go down to the embeddings
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


def training_arguments(model, options: TrainOptions, rows: int, folder: RunFolder, evaluates: bool = False):
    """Our options in transformers' words. Raises: ValueError for sizes, a dtype, an optimizer or a logger that don't work
    here, nothing written."""
    from transformers import TrainingArguments

    _check_loggers(options.report_to)
    half = next(model.parameters()).dtype == torch.float16
    if (half or options.autocast == "float16") and not torch.cuda.is_available():
        raise ValueError("training in float16 needs a GPU: take bfloat16 or float32 for dtype and autocast")
    steps = options.steps(rows)
    arguments = TrainingArguments(
        output_dir=str(folder.path), per_device_train_batch_size=options.micro_batch_size,
        per_device_eval_batch_size=options.micro_batch_size, optim=options.optimizer,
        learning_rate=options.learning_rate, lr_scheduler_type=options.schedule,
        warmup_steps=warmup_steps(options, steps), weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm, num_train_epochs=options.epochs, max_steps=options.max_steps,
        use_cpu=not torch.accelerator.is_available(), seed=options.data_seed, data_seed=options.data_seed,
        fp16=half or options.autocast == "float16", bf16=options.autocast == "bfloat16", torch_compile=options.compile,
        disable_tqdm=True, report_to=options.report_to or "none", run_name=folder.path.name,
        remove_unused_columns=False, prediction_loss_only=True,
        logging_steps=options.log_steps, include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluates and options.eval_steps else "no", eval_steps=options.eval_steps or None,
        save_strategy="steps" if options.save_steps else "no", save_steps=options.save_steps or 500,
        save_total_limit=options.keep_checkpoints or None,
        ddp_find_unused_parameters=False, dataloader_pin_memory=torch.cuda.is_available())
    # One process trains on one device; several are launched by torchrun or accelerate. nn.DataParallel,
    # which Trainer would choose for several visible devices, copies modules and loses the adapter's state.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    arguments.gradient_accumulation_steps = options.accumulation(arguments.world_size)
    return arguments


def _check_loggers(names: Sequence[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    get_reporting_integration_callbacks(list(names))   # ValueError for one that transformers doesn't know
    missing = [name for name in names if name not in get_available_reporting_integrations()]
    if missing:
        raise ValueError(f"report_to: {missing[0]} is not installed")


def warmup_steps(options: TrainOptions, steps: int) -> int:
    """At most a tenth of the run: a short run would else end before it reaches its learning rate."""
    most = max(1, steps // 10)
    if options.warmup_steps > most:
        logger.info("warm-up is %d steps instead of %d: a tenth of %d", most, options.warmup_steps, steps)
    return min(options.warmup_steps, most)
