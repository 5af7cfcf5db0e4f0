"""How much memory training takes, counted in one step on tensors without data.

A copy of the model that holds shapes only gets S²FT's own layers and runs a forward, a backward and a step of the
optimizer on PyTorch's fake tensors, which take the kernels and dtypes of the device and compute nothing. What autograd
saves on the way is what it would save of a real model, storage by storage. Tensors that depend on no weight are real:
token ids, masks, positions, and which expert gets which token.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ContextManager, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from s2ft.attached.hosts.compiled import of_compiled
from s2ft.config import S2FTConfig
from s2ft.estimation.inputs import made_inputs, shape_of, with_cache
from s2ft.estimation.memory import free_memory, resident
from s2ft.estimation.optimizers import OPTIMIZERS, Optimizer, maker
from s2ft.estimation.result import Estimate, Part
from s2ft.estimation.step import Step
from s2ft.estimation.twin import checkpoint, forget_data, twin_of
from s2ft.model.coupling import Coupling

__all__ = ["OPTIMIZERS", "Estimate", "Part", "estimate"]


@of_compiled
def estimate(
    model: nn.Module,
    config: S2FTConfig,
    batch: int | None = None,
    length: int | None = None,
    *,
    optimizer: Optimizer = "adamw",
    gradient_checkpointing: bool | str = False,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    logits: int | None = None,
    accumulation: int = 1,
    use_cache: bool | None = None,
    example: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    couplings: Sequence[Coupling] | None = None,
) -> Estimate:
    """How many bytes training `model` with `config` will take, layer by layer, before anything is attached or loaded.

    Args:
        model: as for :func:`attach`, without adapters; on the meta device, or with weights, of which nothing is read,
            copied or changed. Hooks on it, forwards that were replaced, and checkpointing that is switched on count;
            layers that are dropped at random count as if they never were, and a mixture's experts get as many tokens
            each.
        config: what to train. Units of all selections are counted as if chosen at random, the same number in every
            layer: metrics need data, and sizes depend on the number alone.
        batch: sequences, images or recordings of one forward on one device.
        length: tokens of each, for a model that takes token ids (of encoder-decoders on both sides).
        optimizer: a key of OPTIMIZERS, or a class or function that makes a torch optimizer of a list of parameters.
        gradient_checkpointing: True or "non-reentrant", or "reentrant".
        autocast: the dtype of torch.autocast around the forward.
        dtype: of the weights, where they will be loaded in another one than `model` has now.
        device: "cpu" or "cuda". Default: where a model with weights is, else a GPU where there is one.
        logits: at how many positions of each row, counted from the end: the model's logits_to_keep. Default: all.
        accumulation: forwards to a step; with more than one the gradients lie beside the next forward.
        use_cache: whether keys and values go through a cache. Default: as the model's config says, which is what a
            plain loop gets; transformers' Trainer and the command line train without.
        example: a tensor, a tuple of arguments or a dict of them, labels too, that the model is run on instead of
            inputs made from its config by batch and length. The values are of no matter but in masks and labels.
        loss: of (model, inputs), what to differentiate. Default: the model's own loss where it gives one, for which
            inputs that are made have labels; else all its outputs.
        couplings: as for :func:`attach`.
    Returns: an :class:`Estimate`.
    Raises: ValueError or TypeError naming the argument; ValueError where what the model does depends on what it
        computes, and what :func:`attach` would raise.
    """
    _check(config, batch, length, example, accumulation, logits, use_cache, loss)
    make = maker(optimizer)
    place, kernels, notes = _place(model, device)
    with torch.random.fork_rng([kernels] if kernels.type == "cuda" else []), _not_on_meta():
        twin, record = twin_of(model, config, dtype, couplings)
        if gradient_checkpointing:
            checkpoint(twin, gradient_checkpointing)
        forget_data(twin, kernels)
        inputs = made_inputs(twin, batch, length, logits, kernels) if example is None else example
        step = Step(
            twin.train(),
            record,
            with_cache(twin, inputs, use_cache),
            loss,
            kernels,
            autocast,
            complete=example is not None or loss is not None,
        )
        step.run(make, accumulation)
    if config.units is None and (config.selection, config.allocation) != ("random", "uniform"):
        notes += (f"selection={config.selection!r}, allocation={config.allocation!r} is counted as random and uniform",)
    there = resident(model, place) if dtype is None else 0
    return Estimate(step.parts(), *shape_of(inputs), str(place), *step.peak(), there, free_memory(place), notes)


def _not_on_meta() -> ContextManager:
    """Within ``torch.device("meta")``, where a model is made and this may be called, new tensors would have no data."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()


def _check(
    config: Any, batch: Any, length: Any, example: Any, accumulation: Any, logits: Any, use_cache: Any, loss: Any
) -> None:
    if not isinstance(config, S2FTConfig):
        raise TypeError(f"config must be an S2FTConfig, got {type(config).__name__}")
    if example is not None:
        sizes = {"batch": batch, "length": length, "logits": logits}
        given = [name for name, value in sizes.items() if value is not None]
        if given:
            raise ValueError(f"example says what the model is run on: leave out {', '.join(given)}")
        if not isinstance(example, (Tensor, tuple, list, dict)):
            raise TypeError(f"example must be a tensor, a tuple or a dict, got {type(example).__name__}")
        shape_of(example)
    for name, value, needed in (
        ("batch", batch, example is None),
        ("length", length, False),
        ("logits", logits, False),
        ("accumulation", accumulation, True),
    ):
        if (value is not None or needed) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if use_cache not in (None, True, False):
        raise TypeError(f"use_cache must be True, False or None, got {use_cache!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of (model, inputs), got {type(loss).__name__}")


def _place(model: nn.Module, device: Any) -> tuple[torch.device, torch.device, tuple[str, ...]]:
    """The device to train on, the one whose kernels are taken, and a note where they are not the same."""
    here = {tensor.device for tensor in model.parameters()} - {torch.device("meta")}
    gpu = torch.cuda.is_available()
    if device is None:
        device = next(iter(here)) if len(here) == 1 else "cuda" if gpu else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if place.type == "cuda" and not gpu:
        return place, torch.device("cpu"), ("no GPU is here to ask which kernels it takes: the CPU's are counted",)
    return place, place, ()
