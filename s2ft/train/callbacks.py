"""Callbacks of the Trainer: log.jsonl and the progress, and an early stop."""

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from transformers import TrainerCallback

from s2ft.files.reading import replace_file
from s2ft.train.output import read_log

logger = logging.getLogger(__name__)
# Values of DPO, GRPO and the meter that log.jsonl gets too, by the beginning of their names, and those of the progress.
LOGGED = ("reward", "kl", "entropy", "logps/", "completions/mean_length", "completions/clipped_ratio", "frac_reward",
          "sampling/sampling_logp_difference/", "forgetting", "other_loss", "base_kl",
          "meter_seconds")  # fmt: skip
SHOWN = {"accuracy": "accuracy {:.1%}", "reward": "reward {:.3f}", "rewards/accuracies": "chosen above rejected {:.0%}",
         "forgetting": "forgetting {:+.4f}", "base_kl": "KL from the base {:.4f}"}  # fmt: skip


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
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        self.first, self.seen = state.global_step, state.num_input_tokens_seen
        self.begin = self.clock = time.perf_counter()
        if state.is_world_process_zero:
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_evaluate(self, args, state, control, **kwargs):
        self.clock = time.perf_counter()  # the evaluation does not count in the tokens per second

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


class EvaluateAfterSaving(TrainerCallback):
    """Skips the evaluation at the last step. The run evaluates after it has saved the adapter."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = False


class Stop(TrainerCallback):
    """Writes a checkpoint and stops the run: at a step, or after the update in which Ctrl-C is pressed.

    Args:
        step: The step; 0: none.

    Attributes:
        is_interrupted: Whether Ctrl-C has been pressed.
    """

    def __init__(self, step: int = 0) -> None:
        self.step, self.is_interrupted = step, False

    @contextmanager
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
        logger.info("stopping after this update, with a checkpoint; Ctrl-C again stops at once, without one")

    def stops_at(self, step: int) -> bool:
        """Whether the run stops after this step."""
        return self.is_interrupted or 0 < self.step <= step

    def on_step_end(self, args, state, control, **kwargs):
        if self.stops_at(state.global_step):
            control.should_save = control.should_training_stop = True


def _shown(logs: dict, prefix: str = "") -> str:
    """The accuracy and the values of DPO, GRPO and the meter, for a line of progress."""
    found = {text: logs.get(prefix + key) for key, text in SHOWN.items()}
    return "".join(f", {text.format(value)}" for text, value in found.items() if value is not None)
