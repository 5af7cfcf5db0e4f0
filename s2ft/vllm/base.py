"""The base that a vLLM engine serves, as adapters have to know it: its structure and its fingerprint."""

import functools
from pathlib import Path
from typing import Any

from torch import nn

from s2ft.adapter.adapter import Adapter
from s2ft.model.coupling import Coupling
from s2ft.model.location import Structure, structure_of
from s2ft.model.registry import couplings_of
from s2ft.vllm.compatibility import part_of

ATTRIBUTE = "s2ft_base"  # of a WorkerLoRAManager


def served_base(manager: Any) -> "Base":
    """Return the base of an engine; it is made at the first adapter.

    Args:
        manager: vLLM's WorkerLoRAManager.
    """
    base = getattr(manager, ATTRIBUTE, None)
    if base is None:
        base = Base(part_of(manager, "s2ft_model_config"))
        setattr(manager, ATTRIBUTE, base)
    return base


class Base:
    """The model that a vLLM engine was started with."""

    def __init__(self, model_config: Any) -> None:
        """Remember where the model is from. Nothing is read.

        Args:
            model_config: vLLM's ModelConfig.
        """
        self._config = model_config

    def structure(self, adapter: Adapter) -> Structure:
        """Return where an adapter's slices lie.

        Raises:
            ValueError: The adapter has projections that the model lacks.
        """
        model, couplings = self._described(None)
        return structure_of(model, couplings, adapter.deltas)

    def check(self, adapter: Adapter) -> None:
        """To come."""

    @functools.cache
    def _described(self, custom: tuple[Coupling, ...] | None) -> tuple[nn.Module, list[Coupling]]:
        """The model on the meta device, and its couplings."""
        from s2ft.text.models import hollow_model

        model = hollow_model(str(Path(self._config.model)))
        return model, couplings_of(model, custom)
