"""The settings of an adapter as the configuration files of other programs have them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from s2ft.config import did_you_mean
from s2ft.peft import S2FTPeftConfig

# Fields that the injection writes, that the program knows itself, or that hold no value of a configuration file.
NOT_SETTINGS = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("base_fingerprint", "chosen_by", "couplings", "info", "init_weights", "skipped", "uncoupled"),
)


def config_from(settings: Any, where: str, **defaults: Any) -> S2FTPeftConfig:
    """Make the config of an adapter from the settings in another program's configuration file.

    Args:
        settings: The settings by name, such as ``{"d_ratio": 0.03, "seed": 7}``.
        where: The place of the settings, which errors name: ``s2ft`` in ``s2ft: {d_ratio: 0.03}``.
        defaults: Values of fields that the settings don't have. None has no effect.

    Returns:
        The config.

    Raises:
        ValueError: The settings are no mapping, select nothing, or one of them is unknown or has a wrong value.

    Example:
        >>> from s2ft.integrations.settings import config_from
        >>> config_from({"d_ratio": 0.1}, "s2ft", task_type="CAUSAL_LM").ratios
        {'d': 0.1}
    """
    if not isinstance(settings, Mapping) or not settings:
        raise ValueError(f"{where} must say what is trained, for example {where}: {{d_ratio: 0.03}}, got {settings!r}")
    known = [one.name for one in fields(S2FTPeftConfig) if one.init and one.name not in NOT_SETTINGS]
    for name in settings:
        if name not in known:
            nearest = did_you_mean(str(name), known) or f"; there are {', '.join(sorted(known))}"
            raise ValueError(f"{where} has no setting {name!r}{nearest}")
    given = {**defaults, **{name: value for name, value in settings.items() if value is not None}}
    try:
        return S2FTPeftConfig(**{name: value for name, value in given.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
