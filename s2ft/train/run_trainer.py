"""What the Trainers of s2ft sft, dpo and grpo share."""

import copy

from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from s2ft.train.options import SCHEDULES
from s2ft.train.output import log_failure


class RunMethods:
    """Mixin for TRL's Trainers in a run: nothing is sent, no update is wasted, a failed evaluation is logged."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def create_model_card(self, *args, **options) -> None:
        """Write no model card into checkpoints. The command writes one beside the adapter."""

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the schedule of transformers without its first step, whose learning rate of 0 wastes an update.

        Schedules whose arguments are needed but not given get those of :data:`~s2ft.train.options.SCHEDULES`.
        """
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        warmup = self.args.get_warmup_steps(num_training_steps)
        skipped = 1 if warmup else 0
        schedule = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=self.optimizer if optimizer is None else optimizer,
            num_warmup_steps=warmup + skipped,
            num_training_steps=num_training_steps + skipped,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs or self._schedule_arguments(num_training_steps),
        )
        if skipped and isinstance(schedule, LambdaLR):
            later = [lambda step, rate=rate: rate(step + 1) for rate in schedule.lr_lambdas]
            schedule = LambdaLR(schedule.optimizer, later)
        self.lr_scheduler, self._created_lr_scheduler = schedule, True
        return schedule

    def _schedule_arguments(self, steps: int) -> dict:
        name = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        if name == "warmup_stable_decay":
            return {"num_decay_steps": max(1, steps // 10)}
        return dict(SCHEDULES.get(name, {}))

    def evaluate(self, *args, **options):
        """Evaluate. An error is logged and training continues, unless there are other ranks, which would wait."""
        try:
            return super().evaluate(*args, **options)
        except Exception as error:
            if self.args.world_size > 1 or self.args.load_best_model_at_end:
                raise
            log_failure(f"the evaluation at step {self.state.global_step} failed", error)
            return {}


class Changed:
    """What TRL's constructor changes in a model, and how it was before."""

    def __init__(self, model) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model  # as TRL does
        self.forward = self.model.__dict__.get("forward")
        self.trained = {parameter: parameter.data for parameter in model.parameters() if parameter.requires_grad}
        configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
        self.configs = [(config, dict(vars(config))) for config in configs if config is not None]
        self.tags = model.__dict__.get("model_tags")

    def undo_always(self) -> None:
        """Undo what no run needs. TRL rounds the trained parameters of a quantized model to bfloat16, and adds tags."""
        for parameter, data in self.trained.items():
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.trained = {}
        self.model.__dict__.pop("model_tags", None)
        if self.tags is not None:
            self.model.model_tags = self.tags

    def undo(self) -> None:
        """Undo the changes that TRL's own loss needs: the model's forward, and values of its configs."""
        self.model.__dict__.pop("forward", None)
        if self.forward is not None:
            self.model.forward = self.forward
        for config, values in self.configs:
            vars(config).clear()
            vars(config).update(values)


def without_checkpointing(arguments):
    """Return a copy of the arguments for TRL without gradient checkpointing, which the run turns on itself."""
    arguments = copy.copy(arguments)
    arguments.gradient_checkpointing, arguments.gradient_checkpointing_kwargs = False, None
    if hasattr(arguments, "activation_checkpointing"):
        arguments.activation_checkpointing, arguments.activation_checkpointing_kwargs = False, None
    return arguments
