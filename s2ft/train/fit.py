"""Train an attached model by one of TRL's Trainers, save its adapter, report, and evaluate.

The three functions :func:`sft`, :func:`dpo` and :func:`grpo` make their Trainers. All else is the same for them.
"""

import contextlib
import hashlib
import json
import logging
import math
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_callback import PrinterCallback

import s2ft
from s2ft.attached.loading import restore_adapter
from s2ft.attached.saving import gather_trained
from s2ft.config import refuse
from s2ft.distributed import all_ranks, run_on_ranks
from s2ft.files.plain_text import replace_file
from s2ft.packages import check_packages
from s2ft.text.divergence import Drift
from s2ft.text.evaluation import Comparison, HeldOut
from s2ft.text.generation import contiguous_head
from s2ft.text.prompts import pad_id
from s2ft.train import output
from s2ft.train.batching import choose_batching, short_row
from s2ft.train.loss import chunked_loss, why_not_chunked
from s2ft.train.options import RunOptions
from s2ft.train.output import RunFolder, best_checkpoint, log_failure, newest_valid, read_log, write_json
from s2ft.train.parallel import check_divided_rows, model_is_spread, run_where_weights_are
from s2ft.train.trainers import DPORunTrainer, GRPORunTrainer, SFTRunTrainer, needs_trl_loss

logger = logging.getLogger(__name__)
# Values of DPO, GRPO and the meter that log.jsonl gets too, by the beginning of their names, and those of the progress.
LOGGED = ("reward", "kl", "entropy", "logps/", "completions/mean_length", "completions/clipped_ratio", "frac_reward",
          "sampling/sampling_logp_difference/", "forgetting", "other_loss", "base_kl",
          "meter_seconds")  # fmt: skip
SHOWN = {"accuracy": "accuracy {:.1%}", "reward": "reward {:.3f}", "rewards/accuracies": "chosen above rejected {:.0%}",
         "forgetting": "forgetting {:+.4f}", "base_kl": "KL from the base {:.4f}"}  # fmt: skip


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
        found = {
            "seconds": round(self.seconds, 2),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "best_step": self.best_step,
            "reward": self.reward,
            **(self.drift.to_dict() if self.drift else {}),
            "comparison": self.comparison and self.comparison.to_dict(),
            "stopped_at": self.stopped_at,
            "kept_step": self.kept_step,
        }
        return {"steps": self.steps, "loss": self.loss, **{key: one for key, one in found.items() if one is not None}}


def run_trainer(trainer, model, arguments, folder: RunFolder, resume: bool | Path, meter: Any = None) -> Finetuned:
    """Train, save the adapter, write the report, evaluate, and draw the plot.

    Args:
        trainer: A Trainer with the callbacks of :func:`callbacks_of`.
        model: The model, with the adapter.
        arguments: The arguments of the run.
        folder: The output folder.
        resume: Continue from the newest valid checkpoint, or from the start if there is none. A path names another
            checkpoint of the run.
        meter: A :class:`~s2ft.train.forgetting.ForgettingMeter` that is not among the callbacks yet, or None.
    """
    checkpoint = None
    if resume:
        checkpoint = resume if isinstance(resume, Path) else newest_valid(folder.path)
        logger.info("resuming from %s", checkpoint.name if checkpoint else "the start: there is no valid checkpoint")
    trainer.remove_callback(PrinterCallback)  # JsonlLog shows the same values
    if meter is not None:
        meter.add_to(trainer)
    with checkpointing(model, arguments), contextlib.ExitStack() as stack:
        stack.callback(trainer.restore_model)  # what TRL's loss changes in the model
        result = _train_and_save(trainer, model, folder, checkpoint, meter)
    if trainer.is_world_process_zero():
        with log_errors(f"{folder.plot} was not drawn"):
            check_packages("loss.png")
            output.loss_figure(read_log(folder.log), folder.path.absolute().name).savefig(folder.plot, dpi=120)
    trainer.accelerator.wait_for_everyone()
    return result


def _train_and_save(trainer, model, folder: RunFolder, checkpoint: Path | None, meter: Any) -> Finetuned:
    """Train, save the adapter, write the report, and evaluate unless the log has an evaluation of the last step."""
    state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    start = time.perf_counter()
    stop = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Stop))
    with stop.listening(trainer.args):
        _train(trainer, checkpoint, state)
    seconds, step = time.perf_counter() - start, trainer.state.global_step
    stopped = step < trainer.state.max_steps and stop.stops_at(step)
    at_limit, kept = (None, None) if meter is None else (meter.stopped_at, meter.kept_step)
    finished, best = not stopped or at_limit is not None, _best_step(trainer)
    if finished:
        # a schedule-free optimizer trains with other weights than its result, which earlier steps have already
        if hasattr(trainer.optimizer, "eval") and best is None and kept in (None, step):
            trainer.optimizer.eval()
        # gathered on each rank, since a sharded adapter is spread over all of them
        save = partial(s2ft.save_adapter, model, folder.adapter, state=gather_trained(model))
        run_on_ranks("saving the adapter of the run", all_ranks(), trainer.is_world_process_zero(), save)
    lines = read_log(folder.log)
    result = Finetuned(
        steps=step,
        loss=_last_mean(lines, "loss") or 0.0,
        seconds=seconds,
        adapter=folder.adapter,
        tokens_per_second=(trainer.state.num_input_tokens_seen - (state.num_input_tokens_seen if state else 0))
        / seconds,
        finished=finished,
        best_step=best,
        reward=_last_mean(lines, "reward"),
        drift=_drift(meter, lines, best or kept),
        stopped_at=at_limit,
        kept_step=None if at_limit is None else best or kept,
        interrupted=stopped and stop.is_interrupted,
    )
    if finished and trainer.is_world_process_zero():
        with log_errors(f"{folder.report} was not written"):
            write_json(folder.report, result.to_dict())
    if finished and trainer.eval_dataset is not None and best is None:
        # the first rank reads the log and tells the others
        if not broadcast_object_list([any("eval_loss" in line and line["step"] == step for line in lines)])[0]:
            trainer.evaluate()
    return result


def _drift(meter: Any, lines: list[dict], step: int | None) -> Drift | None:
    """Return the measurement of a step, or else the last one. An earlier process may have logged it."""
    if meter is None:
        return None
    measured = {
        line["step"]: Drift(line.get("forgetting"), line.get("other_loss"), line.get("base_kl"))
        for line in lines
        if "forgetting" in line or "base_kl" in line
    } | meter.measured
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


def _has_ended(trainer, state: TrainerState) -> bool:
    """Whether the run of a checkpoint has made its last step, or was stopped early."""
    stops = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    noted = state.stateful_callbacks.get("EarlyStoppingCallback", {})
    counter = noted["attributes"]["early_stopping_patience_counter"] if noted else 0
    patience = min((one.early_stopping_patience for one in stops), default=math.inf)
    return 0 < state.max_steps <= state.global_step or counter >= patience


def _train(trainer, checkpoint: Path | None, state: TrainerState | None) -> None:
    """Train to the last step. An error after it, such as one of a logger, is logged, so that the adapter is saved."""
    if state is not None and _has_ended(trainer, state):  # the Trainer would train one more step
        trainer.state, state.is_world_process_zero = state, trainer.is_world_process_zero()
        best = best_checkpoint(state, trainer.args.output_dir) if trainer.args.load_best_model_at_end else None
        restore_adapter(trainer.accelerator.unwrap_model(trainer.model), best or checkpoint)
        return
    trainer.args.eval_on_start &= checkpoint is None  # it would count for an early stop
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        # With several ranks, others may wait for this one, so the run cannot continue.
        if trainer.args.world_size > 1 or not 0 < trainer.state.max_steps <= trainer.state.global_step:
            raise
        log_failure("all steps are trained, but the trainer failed after the last one", error)


@contextlib.contextmanager
def log_errors(failure: str) -> Iterator[None]:
    """Log an error that is raised inside the context, with `failure` and the reason, and continue."""
    try:
        yield
    except Exception as error:
        log_failure(failure, error)


@contextlib.contextmanager
def checkpointing(model, arguments) -> Iterator[None]:
    """Turn on activation checkpointing inside the context if the arguments ask for it.

    Blocks then keep only their inputs, and compute the rest again in the backward pass.
    """
    if not is_checkpointed(arguments):
        yield
        return
    given = getattr(arguments, "activation_checkpointing_kwargs", None) or arguments.gradient_checkpointing_kwargs
    given = dict(given or {})
    apart = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}  # no checkpoint's own
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # transformers 5.2x
    getattr(model, f"{kind}_checkpointing_enable")(
        **{f"{kind}_checkpointing_kwargs": {"use_reentrant": False, **given}}, **apart
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


def check_packages_of_run(arguments) -> None:
    """Check that the packages of the optimizer and of loggers are installed.

    Args:
        arguments: The SFTArguments.

    Raises:
        MissingPackages: Names the packages that are missing and the line that installs them.
        ValueError: transformers does not know a logger, or cannot use it here.
    """
    check_packages(f"optimizer {getattr(arguments.optim, 'value', arguments.optim)}")
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    loggers = [name for name in arguments.report_to or [] if name != "none"]
    get_reporting_integration_callbacks(loggers)  # ValueError for an unknown name
    for name in loggers:
        check_packages(f"report_to {name}")
        if name not in (*get_available_reporting_integrations(), "flyte"):  # transformers omits flyte
            raise ValueError(f"report_to: transformers can't use {name} with its present installation and settings")


# ---- callbacks: log.jsonl and the progress, and an early stop -------------------------------------------


def callbacks_of(arguments, folder: RunFolder, options: RunOptions) -> list[Any]:
    """Make the callbacks of a run: progress, log.jsonl, and when it stops. The arguments are those of a method."""
    callbacks: list[Any] = [
        JsonlLog(folder.log),
        Stop(options.stop_after, getattr(arguments, "updates_per_generation", 1)),
    ]
    if arguments.load_best_model_at_end and arguments.save_total_limit == 1:
        arguments.save_total_limit = 2  # the Trainer would delete the last checkpoint, from which a stopped run goes on
    if options.early_stopping_patience:
        arguments.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience, options.early_stopping_threshold))
    return callbacks


class JsonlLog(TrainerCallback):
    """Writes log.jsonl on the first rank, and logs the progress in lines.

    The line of a logged step has step, epoch, loss, learning_rate, grad_norm and tokens_per_second. The line of an
    evaluation has step, epoch, eval_loss and, if answers are scored, eval_accuracy. Both have the rewards of DPO and
    GRPO, and a step at which a meter has measured has its values. A resumed run keeps the lines up to its checkpoint,
    because it writes the later ones again.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.clock = path, 0.0  # a run that had ended is only evaluated

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.seen = state.global_step, state.num_input_tokens_seen
        self.begin = self.clock = time.perf_counter()
        if state.is_world_process_zero:
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.clock += (metrics or {}).get("eval_runtime", 0.0)  # the evaluation does not count in the tokens per second

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._step(state, logs)
        elif "eval_loss" in logs:
            self._write(state, {key: logs[key] for key in ("eval_loss", "eval_accuracy") if key in logs}, logs, "eval_")
            loss = f"evaluation loss {logs['eval_loss']:.4f}{_shown(logs, 'eval_')}"
            logger.info(f"step {state.global_step}/{state.max_steps}: {loss}")

    def _step(self, state, logs: dict) -> None:
        """Log a step, with the tokens per second since the last one."""
        now, seen = time.perf_counter(), state.num_input_tokens_seen
        speed = (seen - self.seen) / (now - self.clock - logs.get("meter_seconds", 0.0))
        self.seen, self.clock = seen, now
        values = {"loss": logs["loss"], "learning_rate": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
        self._write(state, {**values, "tokens_per_second": round(speed, 1)}, logs, "")
        each = (now - self.begin) / max(1, state.global_step - self.first)
        logger.info(
            f"step {state.global_step}/{state.max_steps}, epoch {state.epoch:.2f}, loss {logs['loss']:.4f}"
            f"{_shown(logs)}, learning rate {logs['learning_rate']:.2e}, {speed:,.0f} tokens/s, "
            f"{timedelta(seconds=round(each * (state.max_steps - state.global_step)))} left"
        )

    def _write(self, state, values: dict, logs: dict, prefix: str) -> None:
        names = tuple(prefix + name for name in LOGGED)
        more = {key: value for key, value in logs.items() if key.startswith(names)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **values, **more}) + "\n")


def _shown(logs: dict, prefix: str = "") -> str:
    """The accuracy and the values of DPO, GRPO and the meter, for a line of progress."""
    found = {text: logs.get(prefix + key) for key, text in SHOWN.items()}
    return "".join(f", {text.format(value)}" for text, value in found.items() if value is not None)


class Stop(TrainerCallback):
    """Writes a checkpoint and stops the run: at a step, or after the update in which Ctrl-C is pressed.

    The last step is logged. It is not evaluated, unless the best checkpoint is wanted.

    Args:
        step: The step; 0: none.
        cycle: The run stops after a multiple of so many steps only, from where it can go on.

    Attributes:
        is_interrupted: Whether Ctrl-C has been pressed.
    """

    def __init__(self, step: int = 0, cycle: int = 1) -> None:
        self.step, self.cycle, self.is_interrupted = step, cycle, False

    @contextlib.contextmanager
    def listening(self, args) -> Iterator[None]:
        """Listen for Ctrl-C inside the context. A second one ends the run at once, as everywhere else.

        Several ranks do not listen: each would stop after another update.
        """
        ours = threading.current_thread() is threading.main_thread() and args.world_size == 1
        if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _on_signal(self, *_) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.is_interrupted = True
        logger.info("stopping after an update, with a checkpoint; Ctrl-C again stops at once, without one")

    def stops_at(self, step: int) -> bool:
        """Whether the run stops after this step."""
        return (self.is_interrupted or 0 < self.step <= step) and step % self.cycle == 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.stops_at(state.global_step):
            control.should_save = control.should_training_stop = control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate &= args.load_best_model_at_end  # else after the adapter is saved

    def on_epoch_end(self, args, state, control, **kwargs):
        """The Trainer comes here at every stop. Only a whole epoch is evaluated, and its checkpoint written again."""
        if control.should_training_stop and self.stops_at(state.global_step) and state.global_step < state.max_steps:
            control.should_evaluate &= state.epoch == int(state.epoch)
            control.should_save = control.should_evaluate


# ---- SFT ------------------------------------------------------------------------------------------------


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
        ValueError: The arguments do not fit the data or the model.
    """
    check_dtype(model, arguments)
    check_divided_rows(model, arguments)
    trainer = trainer_for(model, tokenizer, train, arguments, folder, options, held_out)
    with contiguous_head(model), loss_for(model, arguments, options, trainer.data_collator([short_row(train)])):
        return run_trainer(trainer, model, arguments, folder, resume, meter)


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
    batching = choose_batching(model, pad_id(tokenizer), train, arguments, needs_trl_loss(arguments))
    rows = batching.prepare(train, arguments)
    trainer = SFTRunTrainer(
        model,
        arguments,
        rows,
        batching,
        tokenizer=tokenizer,
        held_out=held_out,
        callbacks=callbacks_of(arguments, folder, options),
    )
    if trainer.is_world_process_zero():
        logger.info(batching.line(len(train), len(rows)))
    return trainer


def check_dtype(model, arguments) -> None:
    """Check that the dtype of a model works here, and turn on the loss scaler and autocast of float16."""
    if next(model.parameters()).dtype != torch.float16 and not arguments.fp16:
        return
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    refuse(
        (
            not torch.cuda.is_available(),
            "training in float16 needs a GPU: set dtype to bfloat16 or float32, and fp16 to false",
        ),
        (
            torch.float16 in trained,
            "what is trained must not be in float16, whose gradients the loss scaler can't take: leave delta_dtype "
            "out, and load the base in bfloat16 or float32 for modules_to_save",
        ),
    )
    arguments.fp16, arguments.mixed_precision = True, "fp16"  # the Trainer reads the second


def loss_for(model, arguments, options: RunOptions, batch: dict) -> contextlib.AbstractContextManager:
    """Return a context with the chunked loss, if the options ask for it and it equals the model's own loss.

    Otherwise the model's own loss is used, and the reason is logged. TRL's own loss, if the arguments ask for it,
    replaces both.
    """
    reason = "not asked for"
    if options.chunked_loss and not needs_trl_loss(arguments):
        batch = {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
        }
        if arguments.torch_compile:
            reason = "the model is compiled as a whole"
        elif model_is_spread(model):
            reason = "the weights are spread over the devices"
        else:  # the same on all devices
            reason = run_where_weights_are("the trial of the loss", model, lambda: why_not_chunked(model, batch))
        if reason and arguments.process_index == 0:
            logger.info("the loss keeps the logits: %s", reason)
    return contextlib.nullcontext() if reason else chunked_loss(model, in_evaluation=True)


# ---- DPO ------------------------------------------------------------------------------------------------


def dpo(
    model,
    tokenizer,
    train,
    arguments,
    folder: RunFolder,
    *,
    options: RunOptions = RunOptions(),
    resume: bool | Path = False,
    held_out=None,
    meter=None,
) -> Finetuned:
    """Train the attached adapter of a model by TRL's DPOTrainer, and save it.

    The reference model is the model itself without its adapter: no second model is loaded. The arguments and errors
    are those of :func:`sft`, with DPOArguments. Rows are pairs of token rows, see
    :func:`s2ft.text.encoding.encode_pairs`. The command has checked the dtype and the packages.
    """
    trainer = DPORunTrainer(
        model,
        arguments,
        train,
        tokenizer=tokenizer,
        held_out=held_out,
        callbacks=callbacks_of(arguments, folder, options),
    )
    return run_trainer(trainer, model, arguments, folder, resume, meter)


# ---- GRPO -----------------------------------------------------------------------------------------------


def grpo(
    model,
    tokenizer,
    train,
    rewards: Sequence[Callable[..., Any]],
    arguments,
    folder: RunFolder,
    *,
    options: RunOptions = RunOptions(),
    resume: bool | Path = False,
    held_out=None,
    meter=None,
    base: str | None = None,
) -> Finetuned:
    """Train the attached adapter of a model by TRL's GRPOTrainer, and save it.

    Answers are generated by transformers with the adapter in the weights, or by vLLM (`arguments.use_vllm`), which gets
    the trained slices after each update and has its base again at the end. The reference model, if `arguments.beta`
    asks for one, is the model itself without its adapter: no second model is loaded. The other arguments and errors are
    those of :func:`sft`, with GRPOArguments and a tokenizer that has the chat template to use.

    Args:
        train: A Dataset with the column `prompt` and the columns that the rewards need. So are the held-out rows.
        rewards: Functions with TRL's signature, see :func:`s2ft.train.rewards.load_rewards`.
        base: Folder of the base for vLLM in this process. Default: where the model was loaded from.
    """
    # The name of the run for a vLLM server. A run that is resumed has the same name, and no other run has it.
    place = f"{socket.gethostname()}:{folder.path.absolute()}"
    trainer = GRPORunTrainer(
        model,
        rewards,
        arguments,
        train,
        tokenizer=tokenizer,
        held_out=held_out,
        callbacks=callbacks_of(arguments, folder, options),
        base=base,
        name=f"s2ft-{hashlib.sha256(place.encode()).hexdigest()[:16]}",
    )
    return run_trainer(trainer, model, arguments, folder, resume, meter)


@contextlib.contextmanager
def base_for_vllm(model, tokenizer, arguments) -> Iterator[str | None]:
    """Write a base that vLLM can't load in its form, such as a .gguf file, to a temporary folder inside the context.

    Args:
        model: The model, without an adapter.
        tokenizer: Its tokenizer.
        arguments: The arguments of the run. Those of GRPO may ask for vLLM.

    Yields:
        The folder; None if vLLM is not used in this process, or loads the model from where it was loaded.
    """
    is_loaded_here = getattr(arguments, "use_vllm", False) and arguments.vllm_mode != "server"
    if not is_loaded_here or not model.name_or_path.endswith(".gguf"):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="s2ft-base-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder
