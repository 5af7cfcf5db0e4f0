"""Models in a wrapper of torch.compile or sentence-transformers: s2ft changes, saves and loads the model inside.

So an adapter has the paths of the model of transformers, and a plain one can load it too.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar, cast

from torch import nn

PACKAGE = "sentence_transformers"
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


# ---- sentence-transformers -------------------------------------------------------------------------------


def is_sentence_model(model: nn.Module) -> bool:
    """Whether this is a SentenceTransformer, SparseEncoder or CrossEncoder. The package is not imported for it."""
    return isinstance(model, nn.Sequential) and any(
        parent.__module__.partition(".")[0] == PACKAGE for parent in type(model).__mro__
    )


def transformer_in(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside a model of sentence-transformers.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = dict(_transformers(model))
    if len(found) == 1:
        return next(iter(found.values()))
    kinds = ", ".join(type(module).__name__ for module in model.children())
    raise ValueError(
        f"{type(model).__name__} must have one model of transformers inside, and it has "
        + (f"{len(found)}, at {', '.join(found)}: pass one of these modules" if found else f"none (modules: {kinds})")
    )


def _transformers(module: nn.Module, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the outermost models of transformers, each once."""
    from transformers import PreTrainedModel  # not at the top, where it would load transformers with every import

    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    if isinstance(module, PreTrainedModel):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _transformers(child, f"{path}.{name}" if path else name, seen)


def check_rest_frozen(model: nn.Module) -> None:
    """Check that a model of sentence-transformers trains nothing outside of its model of transformers.

    Any other model passes.

    Raises:
        ValueError: A parameter outside would be trained, and an adapter can't contain it.
    """
    if not is_sentence_model(model):
        return
    inside = {id(parameter) for parameter in transformer_in(model).parameters()}
    trained = [key for key, value in model.named_parameters() if value.requires_grad and id(value) not in inside]
    if trained:
        first = trained[0].partition(".")[0]
        raise ValueError(
            f"{type(model).__name__} would also train {', '.join(trained[:3])}, and an adapter contains weights of the "
            f"model of transformers only: freeze the module by model[{first}].requires_grad_(False), or, to train it "
            "too, attach to model.transformers_model and save the whole model after s2ft.merge"
        )


def with_rest_frozen(function: Function) -> Function:
    """Decorator: call :func:`check_rest_frozen` with the model before the function."""

    @wraps(function)
    def call(model: nn.Module, *args, **options):
        check_rest_frozen(model)
        return function(model, *args, **options)

    return cast(Function, call)
