"""Models in a wrapper: functions that read or change layers need the model inside."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import nn

from s2ft.attached.hosts.sentence_transformers import is_sentence_model, transformer_in

Function = TypeVar("Function", bound=Callable[..., Any])


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile or sentence-transformers has wrapped. Any other model is returned unchanged.

    Raises:
        ValueError: A model of sentence-transformers has no model of transformers inside, or more than one.
    """
    model = uncompiled(model)
    return uncompiled(transformer_in(model)) if is_sentence_model(model) else model


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that torch.compile has wrapped. Any other model is returned unchanged."""
    while "_orig_mod" in getattr(model, "_modules", ()):
        model = model._modules["_orig_mod"]
    return model


def of_compiled(function: Function) -> Function:
    """Decorator: pass the model inside a wrapper of torch.compile or sentence-transformers to the function.

    The compiled model notices replaced layers and is compiled again at its next call.
    """

    @wraps(function)
    def call(model: nn.Module, *args, **options):
        return function(unwrapped(model), *args, **options)

    return cast(Function, call)
