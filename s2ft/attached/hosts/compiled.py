"""Models that torch.compile has wrapped: what changes a model's layers or reads them wants the model inside."""

from collections.abc import Callable
from functools import wraps

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that torch.compile was given; any other as it is."""
    while "_orig_mod" in getattr(model, "_modules", ()):
        model = model._modules["_orig_mod"]
    return model


def of_compiled(function: Callable) -> Callable:
    """Decorator: of a wrapper that torch.compile made, the function gets the model inside. What was compiled notices
    that layers were replaced and is compiled again at its next call."""

    @wraps(function)
    def call(model: nn.Module, *args, **options):
        return function(unwrapped(model), *args, **options)

    return call
