"""Callbacks of the Trainer: progress, log.jsonl, and an early stop."""

import json
import logging
import sys
import time
from datetime import timedelta
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from s2ft.files.writing import replace_file
from s2ft.train.output import read_log

logger = logging.getLogger(__name__)


# Values of DPO, GRPO and the meter that log.jsonl gets too, by the beginning of their names, and those of the progress.
LOGGED = ("reward", "kl", "entropy", "logps/", "completions/mean_length", "completions/clipped_ratio", "frac_reward",
          "sampling/sampling_logp_difference/", "forgetting", "other_loss", "base_kl",
          "meter_seconds")  # fmt: skip
SHOWN = {"reward": "reward {:.3f}", "rewards/accuracies": "chosen above rejected {:.0%}",
         "forgetting": "forgetting {:+.4f}", "base_kl": "KL from the base {:.4f}"}  # fmt: skip


class Speed:
    """Counts the tokens that are trained on in a second. Call `start` once, and `lap` for each logged step."""

    def start(self, state) -> None:
        self.seen, self.clock = state.num_input_tokens_seen, time.perf_counter()

    def lap(self, state) -> float:
        """Return the tokens per second since the last lap."""
        now, seen = time.perf_counter(), state.num_input_tokens_seen
        speed = (seen - self.seen) / (now - self.clock)
        self.seen, self.clock = seen, now
        return speed

    def leave_out(self, seconds: float) -> None:
        """Do not count a time since the last lap, which a measurement took."""
        self.clock += seconds

    def leave_out_evaluation(self) -> None:
        """Do not count the time since the last lap, which an evaluation took."""
        self.clock = time.perf_counter()


class LossBar(ProgressCallback):
    """Shows the progress: a bar in a terminal, and a plain line for each logged step anywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.in_terminal = sys.stderr.isatty()
        self.speed = Speed()

    def on_train_begin(self, args, state, control, **kwargs):
        self.speed.start(state)
        self.first_step, self.begin = state.global_step, time.perf_counter()
        if self.in_terminal:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.in_terminal:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.in_terminal:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self.speed.leave_out_evaluation()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            accuracy = f", accuracy {logs['eval_accuracy']:.1%}" if "eval_accuracy" in logs else ""
            self._print(
                f"step {state.global_step}/{state.max_steps}: evaluation loss {logs['eval_loss']:.4f}{accuracy}"
                + shown(logs, "eval_")
            )
        elif "loss" in logs and self.training_bar is not None:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}{shown(logs)}, lr {logs['learning_rate']:.2e}")
        elif "loss" in logs:
            self._print(self._line(state, logs))

    def _line(self, state, logs: dict) -> str:
        """Return the line of a logged step."""
        self.speed.leave_out(logs.get("meter_seconds", 0.0))
        done = state.global_step - self.first_step
        left = (time.perf_counter() - self.begin) / max(1, done) * (state.max_steps - state.global_step)
        return (
            f"step {state.global_step}/{state.max_steps}, epoch {state.epoch:.2f}, loss {logs['loss']:.4f}"
            f"{shown(logs)}, learning rate {logs['learning_rate']:.2e}, {self.speed.lap(state):,.0f} tokens/s, "
            f"{timedelta(seconds=round(left))} left"
        )

    def _print(self, line: str) -> None:
        if self.training_bar is None:
            logger.info(line)
        else:
            self.training_bar.write(line, file=sys.stderr)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Close the bar. After an error in the training, its message then begins a new line."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class JsonlLog(TrainerCallback):
    """Writes log.jsonl on the first rank.

    The line of a logged step has step, epoch, loss, learning_rate, grad_norm and tokens_per_second. The line of an
    evaluation has step, epoch, eval_loss and, if answers are scored, eval_accuracy. Both have the rewards of DPO and
    GRPO, and a step at which a meter has measured has its values. A resumed run keeps the lines up to its checkpoint,
    because it writes the later ones again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.speed = Speed()

    def on_train_begin(self, args, state, control, **kwargs):
        self.speed.start(state)
        if state.is_world_process_zero:
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            self.speed.leave_out(logs.get("meter_seconds", 0.0))
            self._write(
                state,
                {
                    "loss": logs["loss"],
                    "learning_rate": logs["learning_rate"],
                    "grad_norm": logs.get("grad_norm"),
                    "tokens_per_second": round(self.speed.lap(state), 1),
                    **_more(logs, ""),
                },
            )
        elif "eval_loss" in logs:
            evaluated = {key: logs[key] for key in ("eval_loss", "eval_accuracy") if key in logs}
            self._write(state, {**evaluated, **_more(logs, "eval_")})

    def on_evaluate(self, args, state, control, **kwargs):
        self.speed.leave_out_evaluation()

    def _write(self, state, values: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **values}) + "\n")


class EvaluateAfterSaving(TrainerCallback):
    """Skips the evaluation at the last step. The run evaluates after it has saved the adapter."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = False


class StopAfter(TrainerCallback):
    """Writes a checkpoint at a step and stops the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


def shown(logs: dict, prefix: str = "") -> str:
    """Return the values of DPO, GRPO and the meter for a line of progress."""
    return "".join(
        f", {text.format(logs[prefix + key])}" for key, text in SHOWN.items() if logs.get(prefix + key) is not None
    )


def _more(logs: dict, prefix: str) -> dict:
    return {key: value for key, value in logs.items() if key.startswith(tuple(prefix + name for name in LOGGED))}
