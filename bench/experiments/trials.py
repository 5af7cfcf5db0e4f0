"""What experiments change of a training, as callbacks of the Trainer. What wins moves into s2ft; the others stay here.

A row of a recipe names them: ``trial: {coverage: 9}``. They work on gradients, or on values after an update. Data,
schedule and loss are those of the other rows.
"""

from collections.abc import Iterable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import TrainerCallback

from s2ft.attached.active import without_trainable


class Trial(TrainerCallback):
    """A callback that knows the trained parameters [outputs or units, …] by name.

    Args:
        model: The model, with its adapter.
        value: What the recipe says.
        texts: Batches of text that is not of the task.
    """

    def __init__(self, model: nn.Module, value: Any, texts: Iterable[dict[str, Tensor]]) -> None:
        self.model, self.value, self.texts = model, value, cycle(texts)
        self.trained = {name: one for name, one in model.named_parameters() if one.requires_grad}


class Coverage(Trial):
    """Each group of outputs trains its own share of the channels of down_proj. The value is the number of groups.

    The slice has all channels, and most of its gradient is set to 0. It measures what is learned, not the time.
    """

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for number, parameter in enumerate(self.trained.values()):
            outputs, channels = parameter.shape
            mixed = torch.randperm(channels, generator=torch.Generator().manual_seed(args.seed + number))
            groups = torch.arange(outputs) * self.value // outputs
            parameter.grad *= groups[:, None] == mixed % self.value


class Factors(Trial):
    """Multiply the learning rate of some projections. The value has a factor for the end of a module's name."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.trained.items():
            parameter.copy_(self.before[name].lerp(parameter, self.value.get(name.split(".")[-2], 1.0)))


class NearBase(Trial):
    """Add the gradient of the value times KL(base‖tuned) on 2 other texts. Only the loss's own gradient is clipped."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batch = {key: one[:, -128:] for key, one in next(self.texts).items() if key in ("input_ids", "attention_mask")}
        with torch.no_grad(), without_trainable(self.model):
            expected = self.model(**batch).logits.log_softmax(-1)
        found = self.model(**batch).logits.log_softmax(-1)
        distances = kl_div(found, expected, log_target=True, reduction="none").sum(-1)
        (self.value * distances[batch["attention_mask"].bool()].mean()).backward()


class Muon(Trial):
    """Updates with equal singular values, as large in the mean square as AdamW's. The value is the momentum.

    Source: Muon (kellerjordan.github.io/posts/muon), with the size of arXiv 2502.16982: 0.2.
    """

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        for name, parameter in self.trained.items():
            mean = vars(self).setdefault("means", {}).setdefault(name, torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 1 - self.value)
            left, values, right = torch.linalg.svd(mean.lerp(parameter.grad, 1 - self.value), full_matrices=False)
            rate = optimizer.param_groups[0]["lr"] * 0.2 * max(parameter.shape) ** 0.5
            parameter.sub_(left * (values > 1e-4 * values[0]) @ right, alpha=rate)  # without directions of rounding
            parameter.grad = None  # AdamW leaves it out


class Average(Trial):
    """End with the mean of the values after the last updates. The value is their number."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > state.max_steps - self.value:
            for name, parameter in self.trained.items():
                vars(self).setdefault("means", {}).setdefault(name, torch.zeros_like(parameter)).add_(
                    parameter, alpha=1 / self.value
                )
        if state.global_step == state.max_steps:
            for name, parameter in self.trained.items():
                parameter.copy_(self.means[name])


class Beside(Trial):
    """Train a LoRA of PEFT beside the slice, and merge it at the end. The value has its options."""

    def __init__(self, model: nn.Module, value: Any, texts: Any) -> None:
        super().__init__(model, value, texts)
        from peft import LoraConfig, inject_adapter_in_model

        with torch.random.fork_rng():
            torch.manual_seed(0)
            inject_adapter_in_model(LoraConfig(**value), model)
        for parameter in self.trained.values():
            parameter.requires_grad_(True)

    def on_train_end(self, args, state, control, **kwargs):
        for path, module in list(self.model.named_modules()):
            if hasattr(module, "lora_A"):
                module.merge()
                self.model.set_submodule(path, module.base_layer)


TRIALS = {
    "coverage": Coverage,
    "factors": Factors,
    "near_base": NearBase,
    "muon": Muon,
    "average": Average,
    "beside": Beside,
}
