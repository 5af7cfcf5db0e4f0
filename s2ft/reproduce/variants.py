"""Variants: what a run trains, resolved to a method and its options before anything is trained."""

from collections.abc import Mapping
from typing import Any

from s2ft.config import S2FTConfig
from s2ft.packages import check_packages
from s2ft.reproduce.methods import METHODS, matched, parameters_of
from s2ft.reproduce.recipe import check_keys, closest
from s2ft.text.models import hollow_model
from s2ft.train.ratio_table import as_random

KEYS = ("method", "options", "learning_rate")


def check_variants(variants: Mapping[str, Any], wanted: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Check the form of variants, and choose some of them.

    Args:
        variants: By name: `method`, and perhaps its `options` and one or several values of `learning_rate`.
        wanted: Names of variants or of methods. None chooses all.

    Returns:
        The chosen variants by name, with `method`, `options` and `learning_rate`, a list or None.

    Raises:
        ValueError: A variant has an unknown key or method, or a wanted one does not exist.

    Example:
        >>> from s2ft.reproduce.variants import check_variants
        >>> check_variants({"lora": {"method": "lora", "options": {"r": 8}}, "s2ft": {"method": "s2ft"}}, ["lora"])
        {'lora': {'method': 'lora', 'options': {'r': 8}, 'learning_rate': None}}
    """
    found = {}
    for name, variant in variants.items():
        if not isinstance(variant, Mapping):
            raise ValueError(f"variant {name} must hold lines such as 'method: s2ft', got {variant!r}")
        check_keys(f"variant {name}", variant, KEYS)
        method = variant.get("method", name)
        if method not in METHODS:
            raise ValueError(
                f"variant {name}: there is no method {method!r}{closest(method, METHODS)}; methods are "
                f"{', '.join(METHODS)}"
            )
        options = variant.get("options") or {}
        if not isinstance(options, Mapping):
            raise ValueError(f"variant {name}: options must hold lines such as 'r: 32', got {options!r}")
        found[str(name)] = {"method": method, "options": dict(options), "learning_rate": _rates(name, variant)}
    if wanted is None:
        return found
    known = [*found, *(variant["method"] for variant in found.values())]
    for word in wanted:
        if word not in known:
            raise ValueError(f"there is no variant or method {word!r} in this recipe: it has {', '.join(found)}")
    return {name: variant for name, variant in found.items() if name in wanted or variant["method"] in wanted}


def _rates(name: str, variant: Mapping[str, Any]) -> list[float] | None:
    rates = variant.get("learning_rate")
    if rates is None:
        return None
    rates = rates if isinstance(rates, list) else [rates]
    if not rates or not all(
        isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in rates
    ):
        raise ValueError(f"variant {name}: learning_rate must be positive numbers, got {variant['learning_rate']!r}")
    return [float(rate) for rate in rates]


def resolve(model_name: str, variants: Mapping[str, dict[str, Any]], equal_to: dict[str, Any] | None = None) -> dict:
    """Return variants with the number of parameters that each trains of a model.

    No weight of the model is read. An option that a method does not take, or that the model does not allow, is found.

    Args:
        model_name: A folder, a name on the hub, or a .gguf file.
        variants: What :func:`check_variants` returned.
        equal_to: A variant. The others then train as many parameters as possible, but not more than it. Full
            fine-tuning stays as it is.

    Returns:
        The variants, each with all `options` and with `parameters`.

    Raises:
        FileNotFoundError: There is no such model.
        MissingPackages: A method needs a package that is not installed.
        ValueError: A method can't be used as a variant says.
    """
    if any(variant["method"] not in ("s2ft", "full") for variant in variants.values()):
        check_packages("s2ft.peft", "leave out the methods of PEFT")
    model = hollow_model(model_name)
    most = None if equal_to is None else trained_parameters(model, equal_to["method"], equal_to["options"])
    resolved = {}
    for name, variant in variants.items():
        method, options = variant["method"], {**METHODS[variant["method"]].defaults, **variant["options"]}
        try:
            if most is not None and METHODS[method].size is not None and variant != equal_to:
                options = matched(model, method, most, options)
            count = trained_parameters(model, method, options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"variant {name}: {error}") from error
        resolved[name] = {**variant, "options": options, "parameters": count}
    return resolved


def trained_parameters(model, method: str, options: Mapping[str, Any]) -> int:
    """Return how many parameters a method trains of a model. The model may be on the meta device.

    Args:
        model: The model, which is not changed.
        method: A name of :data:`s2ft.reproduce.methods.METHODS`.
        options: Options of the method.

    Raises:
        ValueError: The method does not take an option, or the model does not allow it.

    Example:
        >>> from s2ft.reproduce.variants import trained_parameters
        >>> trained_parameters(model, "s2ft", {"d_ratio": 0.1}), trained_parameters(model, "lora", {"r": 8})
        (1664, 11264)
    """
    import s2ft

    options = {**METHODS[method].defaults, **options}
    if method == "full":
        if options:
            raise ValueError(f"full fine-tuning takes no options, got {', '.join(options)}")
        return sum(parameter.numel() for parameter in model.parameters())
    if method != "s2ft":
        return parameters_of(model, method, dict(options))
    try:
        config = S2FTConfig(**options)
    except TypeError as error:
        raise ValueError(f"an option is no field of S2FTConfig: {error}") from None
    return s2ft.plan(model, as_random(config)).trainable
