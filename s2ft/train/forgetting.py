"""A callback that measures forgetting and divergence while a model is trained, and can end the training."""

import logging
import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import Tensor
from transformers import TrainerCallback

from s2ft.attached.active import write_extra
from s2ft.attached.record import unwrapped
from s2ft.config import refuse
from s2ft.distributed import full_tensors, reshard_all
from s2ft.text.divergence import Drift, DriftMeter, base_switch
from s2ft.train.trainer import fully_rounded

logger = logging.getLogger(__name__)
TIMES = 20  # measurements of a run, if the user names no number of steps
LIMITS = {"forgetting": "stop_at_forgetting", "base_kl": "stop_at_kl"}


class ForgettingMeter(TrainerCallback):
    """Measures how far a model has moved from its base, every few steps of a Trainer.

    It works with transformers' Trainer and with those of TRL, for models that s2ft or PEFT trains and for full
    fine-tuning. The values stand in the Trainer's log as `forgetting`, `other_loss` and `base_kl`. Measuring changes
    nothing in the training.

    A run that goes beyond a limit stops at that step. The model then has the values of the last measurement that was
    within all limits. If no measurement after the start of the training was, it keeps the last ones. With
    `load_best_model_at_end`, the Trainer loads its best checkpoint, which was within the limits too.

    With several ranks, each measures all rows, and all use the values of the first one.

    Args:
        other: Token rows of other text, for the forgetting, or None. See :func:`s2ft.text.divergence.text_rows`.
        prompts: Token rows whose labels are the positions of the divergence, or None. See
            :func:`s2ft.text.divergence.prompt_rows`. A function of the model makes them when the base is measured, for
            :func:`s2ft.text.divergence.answer_rows`.
        every: Steps between two measurements. Default: a twentieth of the run. The last step is measured too, and with
            a limit each checkpoint.
        batch_size: Rows of a forward pass.
        stop_at_forgetting: Largest allowed rise of the loss on other text, in nats a token, or None.
        stop_at_kl: Largest allowed divergence, in nats a position, or None.

    Attributes:
        measured: The measurements by step.
        stopped_at: The step at which a limit ended the run, or None.
        kept_step: The step whose values the model has, if a limit ended the run.

    Raises:
        ValueError: Nothing is measured, or a limit has no rows or is not positive.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from s2ft.train.forgetting import ForgettingMeter
        >>> rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in input_ids]
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> meter = ForgettingMeter(other=rows, prompts=rows, every=1)
        >>> options = dict(max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> trainer = Trainer(model, TrainingArguments("run", **options), train_dataset=rows)
        >>> meter.add_to(trainer)
        >>> output = trainer.train()
        {'loss': ...}
        >>> sorted(meter.measured)
        [1, 2]
    """

    def __init__(
        self,
        *,
        other: Any = None,
        prompts: Any = None,
        every: int | None = None,
        batch_size: int = 8,
        stop_at_forgetting: float | None = None,
        stop_at_kl: float | None = None,
    ) -> None:
        self._limits = {
            name: limit for name, limit in zip(LIMITS, (stop_at_forgetting, stop_at_kl)) if limit is not None
        }
        refuse(
            (other is None and prompts is None, "nothing is measured: give other, prompts, or both"),
            (every is not None and every < 1, f"every must be at least 1 step, got {every}"),
            (
                "forgetting" in self._limits and other is None,
                f"stop_at_forgetting={stop_at_forgetting} needs other, rows of other text, which it measures",
            ),
            (
                "base_kl" in self._limits and prompts is None,
                f"stop_at_kl={stop_at_kl} needs prompts, rows of the task's prompts, which it measures",
            ),
            *(
                (not limit > 0, f"{LIMITS[name]} must be above 0, got {limit:g}")
                for name, limit in self._limits.items()
            ),
        )
        self._rows = {"other": other, "prompts": prompts, "batch_size": batch_size}
        self._every, self._meter = every, None
        self._reset()

    def _reset(self) -> None:
        self.measured: dict[int, Drift] = {}
        self.stopped_at: int | None = None
        self.kept_step: int | None = None
        self._within: tuple[int, dict[str, Tensor]] | None = None  # a step and the trained values
        self._seconds: dict[int, float] = {}

    def add_to(self, trainer: Any) -> None:
        """Add the callback to a Trainer, so that all of its loggers get the values.

        ``Trainer(callbacks=[meter])`` works too. Loggers such as those of `report_to` are called earlier then, and miss
        the values.

        Args:
            trainer: A Trainer whose training has not begun.

        Raises:
            ValueError: The rows can't be measured with the Trainer's model.
        """
        # Behind the callback that decides what happens at a step, and before those that log.
        trainer.callback_handler.callbacks.insert(1, self)
        self.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    # ---- events of the Trainer ---------------------------------------------------------------------------

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Measure the base of a model without adapters, which a resumed run changes before the training begins."""
        if base_switch(_inner(model)) is None:
            half = torch.float16 if args.fp16 else torch.bfloat16
            with torch.autocast(args.device.type, half, enabled=args.bf16 or args.fp16):  # the Trainer has not begun
                self._meter = self._of_base(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Measure the base by switching the adapters off, and where a resumed run begins."""
        self._reset()
        has_adapters = base_switch(_inner(model)) is not None
        if self._meter is None and state.global_step and not has_adapters:
            raise ValueError(
                "the base of a model without adapters must be measured before a checkpoint is loaded: call "
                "meter.add_to(trainer) before trainer.train(resume_from_checkpoint=...)"
            )
        if self._meter is None or has_adapters:
            self._meter = self._of_base(model)
        self._steps = self._every or max(1, -(-state.max_steps // TIMES))
        if self._limits and state.global_step:  # the values of the checkpoint, should the run go beyond a limit
            self._measure(state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Measure at every few steps, at the last one, and with a limit before a checkpoint."""
        last = state.global_step >= state.max_steps or control.should_training_stop
        may_save = control.should_save or control.should_evaluate  # which a checkpoint of the best loss follows
        if last or state.global_step % self._steps == 0 or (self._limits and may_save):
            if state.global_step not in self.measured:
                self._measure(state, control, model, args)
            control.should_log = True
        if self.stopped_at is not None:  # the values may be those of an earlier step, without its optimizer's state
            control.should_save = control.should_evaluate = False

    on_epoch_end = on_step_end  # where checkpoints of epochs are asked for

    def on_save(self, args, state, control, model=None, **kwargs):
        """Measure the state of a checkpoint that was asked for after the step, such as the one with the best loss."""
        if self._limits and self.stopped_at is None and state.global_step not in self.measured:
            self._measure(state, control, model, args)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the values to the log of a training step, once measured at this step."""
        drift = self.measured.get(state.global_step)
        if not logs or "loss" not in logs or drift is None:
            return
        values = {**drift.to_dict(), "meter_seconds": round(self._seconds[state.global_step], 3)}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def _of_base(self, model) -> DriftMeter:
        model, rows = _inner(model), dict(self._rows)
        if callable(rows["prompts"]):
            rows["prompts"] = rows["prompts"](model)
        return DriftMeter(model, **rows)

    # ---- measuring and stopping --------------------------------------------------------------------------

    def _measure(self, state, control, model, args=None) -> None:
        start, model = time.perf_counter(), _inner(model)
        with fully_rounded(model):
            drift = broadcast_object_list([self._meter.measure(model)])[0]
        self.measured[state.global_step] = drift
        values = drift.to_dict()
        crossed = [
            f"{name} {values[name]:.4g} is above {LIMITS[name]} {limit:g}"
            for name, limit in self._limits.items()
            if not values[name] <= limit  # NaN is beyond each limit
        ]
        if crossed:
            self._stop(crossed, state, control, model, args)
        elif self._limits:
            reshard_all(model)
            trained = full_tensors({name: one for name, one in model.named_parameters() if one.requires_grad})
            self._within = state.global_step, {name: value.to("cpu", copy=True) for name, value in trained.items()}
        self._seconds[state.global_step] = time.perf_counter() - start

    def _stop(self, crossed: list[str], state, control, model, args) -> None:
        """End the run, and give the model the values of the last measurement within the limits."""
        self.stopped_at, self.kept_step = state.global_step, state.global_step
        control.should_training_stop = True
        why = f"step {state.global_step}: {' and '.join(crossed)}, so the training stops"
        if args is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            text = "%s; the best checkpoint is kept"
        elif self._within is None:
            text = (
                "%s; no measurement was within the limits before, so the values of this step are kept: measure more "
                "often, lower the learning rate, or scale the adapter down"
            )
        else:
            self.kept_step, values = self._within
            reshard_all(model)
            write_extra(dict(model.named_parameters()), values)  # called by every rank
            text = f"%s; the values of step {self.kept_step} are kept: {self.measured[self.kept_step]}"
        if state.is_world_process_zero:
            logger.warning(text, why)


def _inner(model: Any) -> Any:
    """Return the model inside the wrappers of devices and of torch.compile."""
    return unwrapped(extract_model_from_parallel(model))
