"""Train any method by the same trainer, on the same batches and with the same loss."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2ft.reproduce.methods import Prepared
from s2ft.text.output_head import contiguous_head
from s2ft.text.prompts import pad_id
from s2ft.train.batching import choose_batching, short_row
from s2ft.train.callbacks import JsonlLog
from s2ft.train.held_out import HeldOut
from s2ft.train.options import RunOptions
from s2ft.train.output import RunFolder, read_log
from s2ft.train.runs import SFTRunTrainer, TokenRowTrainer
from s2ft.train.sft import checkpointing, loss_for, restored


@dataclass(frozen=True)
class Trained:
    """What a training run has measured.

    Attributes:
        steps: Number of updates.
        seconds: Time of the training, with its evaluations.
        seconds_per_step: Median time of an update.
        tokens_per_second: Tokens without padding, over the whole training.
        losses: The training loss of each logged step.
        log: All lines of log.jsonl, with the evaluations.
    """

    steps: int
    seconds: float
    seconds_per_step: float
    tokens_per_second: float
    losses: list[float]
    log: list[dict[str, Any]]


def train(
    prepared: Prepared,
    tokenizer: Any,
    rows: Any,
    arguments: Any,
    folder: RunFolder,
    *,
    held_out: HeldOut | None = None,
    callbacks: Sequence[Any] = (),
) -> Trained:
    """Train a prepared model. The model keeps what it has learned; nothing but the log and checkpoints is written.

    S²FT and the methods of PEFT get the same trainer, collator and loss, so that their times and results compare.

    Args:
        prepared: The model, as :func:`s2ft.reproduce.methods.prepare` returns it.
        tokenizer: The model's tokenizer.
        rows: The token rows, a Dataset with the columns input_ids and labels.
        arguments: The SFTArguments of the run.
        folder: The folder of log.jsonl.
        held_out: Data to evaluate on, or None.
        callbacks: More callbacks of the Trainer.

    Returns:
        Times and losses.

    Raises:
        ValueError: The arguments do not fit the data or the model.
    """
    from transformers.trainer_callback import PrinterCallback

    base = prepared.base
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.log.write_text("")
    batching = choose_batching(base, pad_id(tokenizer), rows, arguments)
    timer = _step_timer()
    kind = SFTRunTrainer if prepared.method == "s2ft" else TokenRowTrainer
    with (
        contiguous_head(base),
        loss_for(base, arguments, RunOptions(), batching.collator([short_row(rows)])),
        checkpointing(base, arguments),
    ):
        trainer = kind(
            prepared.model,
            arguments,
            batching.prepare(rows, arguments),
            batching,
            tokenizer=tokenizer,
            held_out=held_out,
            callbacks=[JsonlLog(folder.log), timer, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        with restored(prepared.model, trainer):
            trainer.train()
        seconds = time.perf_counter() - start
    log = read_log(folder.log)
    return Trained(
        trainer.state.global_step,
        seconds,
        timer.median(),
        trainer.state.num_input_tokens_seen / seconds,
        [line["loss"] for line in log if "loss" in line],
        log,
    )


def _step_timer():
    """Make a callback that measures the time of each update, without evaluations."""
    from statistics import median

    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter() - self.began)

        def median(self) -> float:
            return median(self.times)

    return StepTimer()
