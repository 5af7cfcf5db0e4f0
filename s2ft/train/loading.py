"""Load the base model of a training command as its options say."""

import logging
from dataclasses import replace
from typing import Any

import torch

from s2ft.config import S2FTConfig
from s2ft.distributed import reads_weights
from s2ft.packages import check_packages
from s2ft.text.models import DTYPES, load_model, locate
from s2ft.train.options import ModelOptions
from s2ft.train.parallel import loading_config

logger = logging.getLogger(__name__)


def load_base(options: ModelOptions, arguments: Any):
    """Load the base model and its tokenizer.

    Args:
        options: How the model is loaded.
        arguments: Arguments of one of TRL's trainers. Their `model_init_kwargs`, `trust_remote_code`, `eos_token` and
            `pad_token` are used.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The model can't be loaded as the options say.
        MissingPackages: A package that the options need is not installed.
    """
    more = dict(getattr(arguments, "model_init_kwargs", None) or {})
    dtype = _name(more.pop("dtype", more.pop("torch_dtype", options.dtype)))
    quantization = more.pop("quantization_config", None) or quantization_config(options, dtype)
    more.setdefault("attn_implementation", options.attn_implementation)
    more.setdefault("distributed_config", loading_config(arguments))
    if quantization is not None and not arguments.use_cpu:
        more.setdefault("device_map", {"": arguments.device})
    elif not reads_weights() and not locate(options.model_name_or_path)[1]:  # a GGUF file is unpacked by every rank
        more.setdefault("device_map", "meta")  # transformers 5.24 would read on every rank
    model, tokenizer = load_model(
        options.model_name_or_path,
        dtype,
        revision=more.pop("revision", options.model_revision),
        trust_remote_code=more.pop("trust_remote_code", getattr(arguments, "trust_remote_code", False)),
        quantization=quantization,
        **{key: value for key, value in more.items() if value is not None},
    )
    for name in ("eos_token", "pad_token"):
        token = getattr(arguments, name, None)
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"{name} {token!r} is not in the vocabulary of {options.model_name_or_path}")
            setattr(tokenizer, name, token)
    return model, tokenizer


def quantization_config(options: ModelOptions, dtype: str = "auto"):
    """Return the quantization config of transformers for the options, or None.

    Args:
        options: How the model is loaded.
        dtype: Dtype in which a 4-bit layer multiplies; "auto": bfloat16.

    Raises:
        MissingPackages: bitsandbytes is not installed.

    Example:
        >>> from s2ft.train.loading import quantization_config
        >>> from s2ft.train.options import ModelOptions
        >>> print(quantization_config(ModelOptions("my-model")))
        None
    """
    if not options.quantized:
        return None
    check_packages("a model in 4 or 8 bit")
    from transformers import BitsAndBytesConfig

    if options.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
        bnb_4bit_quant_storage=options.bnb_4bit_quant_storage,
    )


def fit_layout(config: S2FTConfig, model: torch.nn.Module, chosen: bool) -> S2FTConfig:
    """Choose the layout `indexed` for a quantized model, and log that.

    Args:
        config: What to train.
        model: The base model.
        chosen: Whether the user has chosen the layout.

    Returns:
        The config, with another layout if the model needs it and the user has not chosen one.
    """
    if chosen or config.layout == "indexed" or getattr(model, "hf_quantizer", None) is None:
        return config
    logger.info("layout indexed: weights that are quantized stay where they are")
    return replace(config, layout="indexed")


def _name(dtype: Any) -> str:
    """The name of a dtype: torch.bfloat16, "torch.bfloat16" or "bfloat16"."""
    name = str(dtype or "auto").removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return name
