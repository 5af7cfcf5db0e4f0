"""The table of methods: S²FT by s2ft, the others as PEFT makes them, and full fine-tuning.

It needs nothing else of this folder, so that whoever compares methods on data of their own can use it alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import s2ft
from s2ft.config import S2FTConfig
from s2ft.packages import check_packages
from s2ft.train.planning import as_random

# The projections that the S²FT paper trains with LoRA: q, k, v, up and down.
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExperimentMethod:
    """A way to fine-tune a model.

    Attributes:
        title: Its name in tables.
        config: Name of its configuration class in PEFT, or None if PEFT does not have the method.
        defaults: Options of that class.
        size: The option that sets the number of trained parameters, or None if nothing sets it.
        rate: Peak learning rate at a width of 576, the best one of those measured on SmolLM2-135M (docs/evidence.md).
            It falls with the width, see :func:`default_rate`.
    """

    title: str
    config: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    size: str | None = None
    rate: float = 1e-3


def _lora(**options: Any) -> dict[str, Any]:
    return {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": TARGETS, **options}


METHODS: dict[str, ExperimentMethod] = {
    "s2ft": ExperimentMethod("S²FT", defaults={"d_ratio": 0.03}, size="budget"),
    "lora": ExperimentMethod("LoRA", "LoraConfig", _lora(), "r"),
    "dora": ExperimentMethod("DoRA", "LoraConfig", _lora(use_dora=True), "r", 2e-3),
    "rslora": ExperimentMethod("rsLoRA", "LoraConfig", _lora(use_rslora=True), "r"),
    "shira": ExperimentMethod("SHiRA", "ShiraConfig", {"r": 16, "target_modules": TARGETS}, "r", 2e-3),
    "miss": ExperimentMethod("MiSS", "MissConfig", {"r": 16, "target_modules": TARGETS}, "r", 5e-4),
    "full": ExperimentMethod("full fine-tuning", rate=3e-5),
}


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be trained by one method.

    Attributes:
        model: The model to run. For a method of PEFT it is a PeftModel around the base.
        base: The model that was given, whose layers the method has changed.
        method: Name of the method.
        options: All options of the method, JSON values.
        trainable: Number of trained parameters.
        report: What is trained, as text.
    """

    model: nn.Module
    base: nn.Module
    method: str
    options: dict[str, Any]
    trainable: int
    report: str


def default_rate(method: str, width: int) -> float:
    """Return the peak learning rate from which a search for a method can start.

    Args:
        method: A name of :data:`METHODS`.
        width: Width of the model. The rate is proportional to 1 / width, as that of `s2ft sft` is.
    """
    return METHODS[method].rate * 576 / width


def prepare(
    model: nn.Module,
    method: str,
    options: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    calibration: Iterable[Any] | None = None,
    **more: Any,
) -> Prepared:
    """Give a model the trainable parameters of a method, in place.

    The random choices of a method (which units, which weights, how an adapter begins) follow from the seed.

    Args:
        model: A causal language model of transformers, without adapters.
        method: A name of :data:`METHODS`.
        options: Options of the method that differ from its defaults: fields of S2FTConfig for "s2ft", else arguments
            of PEFT's configuration class. `autocast_adapter_dtype` is the argument of PEFT's get_peft_model: True
            keeps the adapters of a bfloat16 model in float32, which is PEFT's default.
        seed: Seed of the method.
        calibration: Batches for selections of S²FT that need data.
        **more: More arguments of :func:`s2ft.attach`.

    Returns:
        The model, ready to train.

    Raises:
        ValueError: There is no such method, or it does not take an option.
        MissingPackages: PEFT is needed and not installed.
    """
    _check_method(method)
    options = {**METHODS[method].defaults, **(options or {})}
    if method == "s2ft":
        config = _s2ft_config({"seed": seed, **options})
        report = s2ft.attach(model, config, calibration=calibration, **more)
        return Prepared(model, model, method, options, report.trainable, str(report))
    if method == "full":
        _no_options(options)
        wrapped = model.requires_grad_(True)
    else:
        wrapped = _with_peft(model, method, options, seed)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    total = sum(p.numel() for p in wrapped.parameters())
    title = METHODS[method].title
    report = f"{title}: {trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})"
    return Prepared(wrapped, model, method, options, trainable, report)


def matched(model: nn.Module, method: str, parameters: int, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the options with which a method trains as many parameters as possible, but at most so many.

    Args:
        model: The model, which is not changed.
        method: A name of :data:`METHODS`.
        parameters: The largest number of trained parameters.
        options: Options of the method, of which `r` or `budget` is set anew. The `lora_alpha` of the methods that
            have one keeps its ratio to `r`.

    Returns:
        All options of the method.

    Raises:
        ValueError: There is no such method, its size can't be set, or its smallest size is above `parameters`.
    """
    _check_method(method)
    entry = METHODS[method]
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
        method: A name of :data:`METHODS`.
        options: Options of the method that differ from its defaults.

    Raises:
        ValueError: The method does not take an option, or the model does not allow it.
    """
    _check_method(method)
    options = {**METHODS[method].defaults, **(options or {})}
    if method == "s2ft":
        return s2ft.plan(model, as_random(_s2ft_config(options))).trainable  # counted without data and values
    if method == "full":
        _no_options(options)
        return sum(parameter.numel() for parameter in model.parameters())
    if method == "shira":  # it can't be made on the meta device, and trains as many weights as LoRA of its rank
        method, options = "lora", {"r": options["r"], "target_modules": options["target_modules"]}
    with torch.device("meta"):
        copy = type(model)(model.config)
    return sum(p.numel() for p in _with_peft(copy, method, options, 0, meta=True).parameters() if p.requires_grad)


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


def _no_options(options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"full fine-tuning takes no options, got {', '.join(options)}")


def _s2ft_config(options: dict[str, Any]) -> S2FTConfig:
    try:
        return S2FTConfig(**options)
    except TypeError as error:
        raise ValueError(f"an option of method s2ft is no field of S2FTConfig: {error}") from None


def _with_peft(model: nn.Module, method: str, options: dict[str, Any], seed: int, meta: bool = False):
    check_packages("s2ft.peft")
    import peft

    options = dict(options)
    autocast = options.pop("autocast_adapter_dtype", True)
    if method == "shira":
        options.setdefault("random_seed", seed)
    options["target_modules"] = list(options["target_modules"])
    try:
        config = getattr(peft, METHODS[method].config)(task_type="CAUSAL_LM", **options)
    except TypeError as error:
        raise ValueError(f"method {method} does not take an option: {error}") from None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config, autocast_adapter_dtype=autocast, low_cpu_mem_usage=meta)
