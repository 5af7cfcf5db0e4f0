"""Models that torch.compile has wrapped: functions that read or change layers need the model inside."""

from collections.abc import Callable
from functools import wraps

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped. Any other model is returned unchanged."""
    while "_orig_mod" in getattr(model, "_modules", ()):
        model = model._modules["_orig_mod"]
    return model


def of_compiled(function: Callable) -> Callable:
    """Decorator: pass the model inside a wrapper of torch.compile to the function.

    The compiled model notices replaced layers and is compiled again at its next call.
    """

    @wraps(function)
    def call(model: nn.Module, *args, **options):
        return function(unwrapped(model), *args, **options)

    return call
