"""What is shown and written while training: a progress bar and log.jsonl; and stopping early."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from s2ft.files.writing import replace_file
from s2ft.train.output import read_log


class LossBar(ProgressCallback):
    """A progress bar that shows loss and learning rate behind it instead of printing a line a step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}, lr {logs['learning_rate']:.2e}")

    def close(self) -> None:
        """Where training ended in an error, so that its message begins a line."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None


class JsonlLog(TrainerCallback):
    """One line a logged step: step, epoch, loss, learning_rate, grad_norm, tokens_per_second; and one an evaluation:
    step, epoch, eval_loss, eval_accuracy. First rank only.

    A resumed run keeps the lines up to its checkpoint: those after it are written again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen, self.clock = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen, self.clock = state.num_input_tokens_seen, time.perf_counter()
        if state.is_world_process_zero:
            kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or not state.is_world_process_zero:
            return
        if "loss" in logs:
            now, seen = time.perf_counter(), state.num_input_tokens_seen
            self._write(
                state,
                {
                    "loss": logs["loss"],
                    "learning_rate": logs["learning_rate"],
                    "grad_norm": logs.get("grad_norm"),
                    "tokens_per_second": round((seen - self.seen) / (now - self.clock), 1),
                },
            )
            self.seen, self.clock = seen, now
        elif "eval_loss" in logs:
            self._write(state, {key: logs[key] for key in ("eval_loss", "eval_accuracy") if key in logs})

    def on_evaluate(self, args, state, control, **kwargs):
        self.clock = time.perf_counter()  # the time that it took is none of training

    def _write(self, state, values: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **values}) + "\n")


class EvaluateAfterSaving(TrainerCallback):
    """Leaves the evaluation of the last step to finetune(), which first saves the adapter."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = False


class StopAfter(TrainerCallback):
    """Ends a run at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True
