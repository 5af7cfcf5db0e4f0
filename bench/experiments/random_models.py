"""Models with random weights, which take as much time and memory as trained ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import s2ft
from s2ft.config import S2FTConfig
from s2ft.distributed import without_zero_init
from s2ft.files.reading import read_json
from s2ft.text.models import hollow_model

Model = str | Mapping[str, Any]


def config_of(model: Model) -> Any:
    """Return the config of a model of transformers.

    Args:
        model: A folder with config.json, a config file (.json), a .gguf file, a name on the hub, or the fields of a
            config, of which `model_type` is one.

    Returns:
        The config. Its only architecture is the class of the model.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The config can't be read, or no causal language model has it.
    """
    import transformers

    if isinstance(model, str) and not model.endswith(".json"):
        hollow = hollow_model(model)
        hollow.config.architectures = [type(hollow).__name__]
        return hollow.config
    if isinstance(model, str):
        if not Path(model).is_file():
            raise FileNotFoundError(f"config {model} doesn't exist")
        model = read_json(Path(model))
    if not isinstance(model, Mapping) or "model_type" not in model:
        raise ValueError(f"the fields of a config must have model_type, such as 'llama', got {model!r}")
    config = transformers.AutoConfig.for_model(**model)
    config.architectures = [_causal_class(config).__name__]
    return config


def _causal_class(config: Any) -> type:
    """Return the causal language model of a config. Raises ValueError if transformers has none."""
    import transformers

    known = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise ValueError(f"transformers has no causal language model of type {config.model_type!r}")
    return known[type(config)]


def random_model(config: Any, dtype: str = "float32", device: str = "cpu") -> nn.Module:
    """Build a model of a config with random weights, in place on its device.

    Args:
        config: A config. One without architectures is that of a causal language model.
        dtype: Dtype of the weights: "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "meta".

    Returns:
        The model in evaluation mode.
    """
    import transformers

    kind = getattr(transformers, config.architectures[0]) if config.architectures else _causal_class(config)
    with torch.device(device), without_zero_init():
        return kind._from_config(config, dtype=getattr(torch, dtype)).eval()


def at_least_one_unit(hollow: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Raise the ratios that select no unit of a model to the smallest that selects one.

    The ratios of a large model may select nothing in a small one: 2.6 % of 9 heads.

    Args:
        hollow: The model without adapters, on any device.
        options: Fields of S2FTConfig.

    Returns:
        The options, with raised ratios.

    Raises:
        ValueError: :func:`s2ft.plan` refuses the options for another reason.
    """
    from s2ft.model.coupling import projections_of
    from s2ft.model.registry import find_couplings

    found = find_couplings(hollow, None, None, S2FTConfig(**options)).couplings
    fewest: dict[str, int] = {}
    for projection in projections_of(found):
        fewest[projection.key] = min(fewest.get(projection.key, projection.count), projection.count)
    raised = dict(options)
    for key, count in fewest.items():
        ratio = options.get(f"{key}_ratio", 0)
        if 0 < ratio < 0.5 / count:
            raised[f"{key}_ratio"] = round(1 / count, 4)
    s2ft.plan(hollow, S2FTConfig(**raised))
    return raised
