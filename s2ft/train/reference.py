"""The reference model of DPO and GRPO: the model itself without its trainable adapter."""

from typing import Any

import torch
from torch import nn

from s2ft.attached.reference import without_trainable
from s2ft.model.modes import evaluation_mode


class Reference(nn.Module):
    """The base of an attached model, as a reference model that needs no memory.

    A call runs the attached model without its trainable adapter, in evaluation mode and without gradients. The class
    has no parameters of its own. Pass it to TRL's DPOTrainer as `ref_model`, where TRL would load the base a second
    time.

    Args:
        model: A model with a trainable adapter.

    Example:
        >>> from s2ft.train.reference import Reference
        >>> base = model(input_ids).logits
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, ffn_kernel=False, layout="indexed"))
        >>> reference = Reference(model)
        >>> torch.equal(reference(input_ids=input_ids).logits, base), len(list(reference.parameters()))
        (True, 0)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list, so that it is no submodule, which would be moved, wrapped or saved

    @property
    def config(self) -> Any:
        """The config of the attached model."""
        return self._model[0].config

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """Run the base. Libraries replace `forward`, for instance for autocast, which the model itself does already."""
        model = self._model[0]
        with torch.no_grad(), evaluation_mode(model), without_trainable(model):
            return model(*args, **inputs)

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The same as a call."""
        return self(*args, **inputs)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """The state of the attached model. TRL's cache of reference log-probabilities is found by its hash."""
        return self._model[0].state_dict(*args, **options)
