"""Memory of training, counted in one step on tensors without data.

The step runs on a shadow model: a copy of the model on the meta device, which has S²FT's trainable layers but no data.
Its tensors are PyTorch's fake tensors. They choose the kernels and dtypes of the device and compute nothing. In the
forward, the backward and the optimizer's step, autograd saves the same storages as for a real model. Tensors that do
not depend on weights are real: token ids, masks, positions, and the experts of each token.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2ft.attached.record import on_unwrapped
from s2ft.config import S2FTConfig, check_whole
from s2ft.estimation.devices import (
    Estimate,
    MemoryPart,
    Strategy,
    check_devices,
    check_plan,
    on_devices,
    size_of,
    smallest,
)
from s2ft.estimation.shadow import forget_data, made_inputs, make_shadow, shape_of
from s2ft.estimation.step import OPTIMIZERS, Optimizer, ShadowStep, bytes_of, free_memory, maker
from s2ft.model.coupling import Coupling
from s2ft.model.running import check_example
from s2ft.selection import with_units

__all__ = ["OPTIMIZERS", "Estimate", "MemoryPart", "Strategy", "estimate"]


@on_unwrapped
def estimate(
    model: nn.Module,
    config: S2FTConfig | Any,
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
    strategy: str | Strategy | None = None,
    devices: int | None = None,
    memory: int | str | None = None,
) -> Estimate:
    """Estimate the memory of training, layer by layer, before an adapter is attached or weights are loaded.

    With a strategy, all numbers are those of one of several devices. They follow from those of one device by formulas
    for weights, gradients, states and what is gathered, and the peak is within about 10 %. No process group is needed.

    Args:
        model: A model without adapters, as for :func:`attach`. It may be on the meta device. Its weights are not read,
            copied or changed. Its hooks, replaced forwards and gradient checkpointing are taken into account. Layers
            that are dropped at random count as if none were dropped, and all experts of a mixture get as many tokens.
        config: What to train: an S2FTConfig, or PEFT's LoraConfig, to compare. Every selection is counted as random and
            uniform, because metrics need data and the sizes depend only on the number of units. The matrices of a LoRA
            count in the dtype of the weights; in float32, as PEFT makes them for training, they take more.
        batch: Number of sequences, images or recordings in one forward on one device.
        length: Number of tokens of each sequence, for models that take token ids. For an encoder-decoder it applies to
            both sides.
        optimizer: A key of ``s2ft.estimation.OPTIMIZERS``, or a class or function that makes a torch optimizer from a
            list of parameters.
        gradient_checkpointing: True or "non-reentrant", or "reentrant". Default: as the model is set.
        autocast: Dtype of ``torch.autocast`` around the forward. Default: no autocast.
        dtype: Dtype in which the weights will be loaded. Default: the dtype of `model`.
        device: "cpu" or "cuda". Default: the device of the weights, or for a model on the meta device a GPU if there is
            one.
        logits: Number of positions at the end of each row that get logits, the model's ``logits_to_keep``. Default:
            all.
        accumulation: Number of forwards per step. With more than one, the gradients exist during the next forward. As
            in transformers' Trainer, devices exchange gradients only after the last one.
        use_cache: True if keys and values go through a cache. Default: the setting of the model's config, which applies
            in a plain loop. transformers' Trainer and the command line train without a cache.
        example: A tensor, a tuple of arguments or a dict of arguments, with labels, to run the model on instead of
            inputs made from its config, `batch` and `length`. Only the values of masks and labels matter.
        loss: Function of (model, inputs) that returns what to differentiate. Default: the model's own loss if it
            returns one, otherwise all its outputs. Inputs that s2ft makes have labels if the model predicts tokens.
        couplings: The model's couplings, as for :func:`attach`.
        strategy: "ddp", "fsdp2", "zero1", "zero2", "zero3", "tp", "tp+fsdp2", or a :class:`Strategy` with further
            settings. Default: one device.
        devices: Number of devices. Default with a strategy: the smallest number on which the step fits.
        memory: Memory of one device in bytes, or such as "80GB". Default: what is free on `device` here.

    Returns:
        The estimate, in bytes. If no number of devices fits, it is that of the largest number that was tried, and a
        note says so.

    Raises:
        TypeError: An argument has a wrong type. The message names it.
        ValueError: An argument is wrong, :func:`attach` would refuse the model or config, or what the model does
            depends on values that it computes.

    Example:
        >>> estimate = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), batch=2, length=8, optimizer="adamw")
        >>> estimate.trained, estimate.gradients, estimate.optimizer
        (1664, 6656, 13320)
        >>> print(estimate)
        part                parameters  trained  gradients  optimizer  kept for backward
        model.embed_tokens    24.0 KiB        0        0 B        0 B                0 B
        model.layers.0       147.8 KiB      832    3.2 KiB    6.5 KiB              832 B
        ...
        >>> sharded = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.1), 2, 8, strategy="fsdp2", memory="400KB")
        >>> sharded.devices, sharded.fits
        (..., True)
    """
    _check(batch, length, example, accumulation, logits, use_cache, loss)
    strategy = Strategy(strategy) if isinstance(strategy, str) else strategy
    if not (strategy is None or isinstance(strategy, Strategy)):
        raise TypeError(f"strategy must be a name, a Strategy or None, got {type(strategy).__name__}")
    check_devices(strategy, devices)
    memory = size_of(memory, "memory")
    make = maker(optimizer)
    place, kernels, notes = _place(model, device)
    is_lora = getattr(config, "peft_type", None) == "LORA"
    if is_lora and strategy is not None:
        raise ValueError("a LoRA is estimated for one device: leave out strategy")
    config = config if is_lora else with_units(config)
    if not is_lora and config.units is None and config.selection != "random":
        notes += (f"selection={config.selection!r}, allocation={config.allocation!r} is counted as random and uniform",)
    if strategy is not None and strategy.is_tensor_parallel:
        check_plan(model)
    on_cpu = torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext()  # meta has no data
    with torch.random.fork_rng([kernels] if kernels.type == "cuda" else []), on_cpu:
        shadow, record = make_shadow(model, config, dtype, couplings, example)
        forget_data(shadow, record, kernels, gradient_checkpointing)
        inputs = made_inputs(shadow, cast(int, batch), length, logits, kernels) if example is None else example
        if use_cache is not None and isinstance(inputs, dict) and "use_cache" in signature(shadow.forward).parameters:
            inputs = {**inputs, "use_cache": use_cache}
        step = ShadowStep(shadow.train(), record, inputs, loss, kernels, autocast)
        step.run(make, accumulation)
    here = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == place.type]
    loaded = bytes_of(here) if dtype is None and memory is None else 0
    room = free_memory(place) if memory is None else memory
    one = Estimate(step.parts(), *shape_of(inputs), str(place), *step.peak(), loaded, room, notes)
    if strategy is None:
        return one
    divided = {name: counted["divided"] for name, counted in step.sums.items()}
    count = partial(on_devices, one, divided, shadow, strategy)
    return smallest(count, strategy) if devices is None else count(devices)


def _check(batch: Any, length: Any, example: Any, accumulation: Any, logits: Any, use_cache: Any, loss: Any) -> None:
    sizes = {"batch": batch, "length": length, "logits": logits}
    if example is not None:
        needless = [name for name, value in sizes.items() if value is not None]
        if needless:
            raise ValueError(f"example gives the inputs of the model: leave out {', '.join(needless)}")
        check_example(example)
        shape_of(example)
    for name, value in {**sizes, "accumulation": accumulation}.items():
        if value is not None or name == "accumulation" or name == "batch" and example is None:
            check_whole(name, value)
    if use_cache not in (None, True, False):
        raise TypeError(f"use_cache must be True, False or None, got {use_cache!r}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function of (model, inputs), got {type(loss).__name__}")


def _place(model: nn.Module, device: Any) -> tuple[torch.device, torch.device, tuple[str, ...]]:
    """Return the device to train on, the device whose kernels are counted, and a note if these differ."""
    devices = {tensor.device for tensor in model.parameters()} - {torch.device("meta")}
    gpu = torch.cuda.is_available()
    if device is None:
        device = next(iter(devices)) if len(devices) == 1 else "cuda" if gpu else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    if place.type == "cuda" and not gpu:
        return place, torch.device("cpu"), ("there is no GPU here, so the kernels of the CPU are counted",)
    return place, place, ()
