"""Keep the trained parameters of the best evaluation, for any method."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


class KeepBest(TrainerCallback):
    """Callback of a Trainer that keeps a copy of the trained parameters at the evaluation with the smallest loss.

    The copy is in the memory of the CPU. Checkpoints of the Trainer would hold the optimizer too, and methods differ in
    what they write into a checkpoint.

    Args:
        model: The model whose trainable parameters are kept.

    Attributes:
        loss: The smallest loss of an evaluation, or None before the first one.
        step: The step of that evaluation, or None.

    Example:
        >>> from s2ft.reproduce.best import KeepBest
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> best = KeepBest(model)
        >>> best.see(loss=1.0, step=80)
        >>> with torch.no_grad():
        ...     for parameter in model.parameters():
        ...         _ = parameter.add_(1.0) if parameter.requires_grad else None
        >>> best.see(loss=2.0, step=160)
        >>> best.restore()
        80
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.loss, self.step = model, None, None
        self._kept: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **options: Any) -> None:
        """Look at an evaluation. The Trainer calls it."""
        if metrics and "eval_loss" in metrics:
            self.see(metrics["eval_loss"], state.global_step)

    def see(self, loss: float, step: int) -> None:
        """Keep the parameters if this loss is the smallest so far.

        Args:
            loss: The loss of the evaluation. NaN is never the smallest.
            step: The step of the evaluation.
        """
        if loss == loss and (self.loss is None or loss < self.loss):
            self.loss, self.step = loss, step
            self._kept = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad
            }

    def restore(self) -> int | None:
        """Put the kept values into the model, bit for bit.

        Returns:
            The step whose values they are, or None if there was no evaluation, and the model keeps its last values.
        """
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._kept:
                    parameter.copy_(self._kept[name])
        return self.step
