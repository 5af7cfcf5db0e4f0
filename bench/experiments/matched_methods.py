"""How many parameters a method of :data:`s2ft.train.tuners.TUNERS` trains, and its options for a number of them."""

from typing import Any

import torch
from torch import nn

import s2ft
from s2ft.estimation.shadow import as_random
from s2ft.train.tuners import TUNERS, check_no_options, check_tuner, s2ft_config, with_peft


def matched(model: nn.Module, method: str, parameters: int, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the options with which a method trains as many parameters as possible, but at most so many.

    Args:
        model: The model, which is not changed.
        method: A name of :data:`TUNERS`.
        parameters: The largest number of trained parameters.
        options: Options of the method, of which `r` or `budget` is set anew. The `lora_alpha` of the methods that
            have one keeps its ratio to `r`.

    Returns:
        All options of the method.

    Raises:
        ValueError: There is no such method, its size can't be set, or its smallest size is above `parameters`.
    """
    check_tuner(method)
    entry = TUNERS[method]
    options = {**entry.defaults, **(options or {})}
    if entry.size is None:
        raise ValueError(
            f"{entry.title} has no option for the number of trained parameters: leave it out, got {method!r}"
        )
    if method == "s2ft":
        return {**options, "budget": parameters}
    each = trained_parameters(model, method, {**options, "r": 2}) - trained_parameters(
        model, method, {**options, "r": 1}
    )
    fixed = trained_parameters(model, method, {**options, "r": 1}) - each
    rank = (parameters - fixed) // each
    if rank < 1:
        raise ValueError(f"{entry.title} trains at least {fixed + each:,} parameters of this model, got {parameters:,}")
    found = {**options, "r": rank}
    if "lora_alpha" in options:
        found["lora_alpha"] = options["lora_alpha"] * rank / options["r"]
    return found


def trained_parameters(model: nn.Module, method: str, options: dict[str, Any] | None = None) -> int:
    """Return how many parameters a method trains of a model, which may be on the meta device and is not changed.

    Args:
        model: The model.
        method: A name of :data:`TUNERS`.
        options: Options of the method that differ from its defaults.

    Raises:
        ValueError: The method does not take an option, or the model does not allow it.
    """
    check_tuner(method)
    options = {**TUNERS[method].defaults, **(options or {})}
    if method == "s2ft":
        return s2ft.plan(model, as_random(s2ft_config(options, model))).trainable  # counted without data and values
    if method == "full":
        check_no_options(options)
        return sum(parameter.numel() for parameter in model.parameters())
    if method == "shira":  # it can't be made on the meta device, and trains as many weights as LoRA of its rank
        method, options = "lora", {"r": options["r"], "target_modules": options["target_modules"]}
    with torch.device("meta"):
        copy = type(model)(model.config)
    return sum(p.numel() for p in with_peft(copy, method, options, 0, meta=True).parameters() if p.requires_grad)
