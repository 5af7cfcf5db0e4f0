"""Load the base model of a training command as its options say."""

import logging
import os
from dataclasses import replace
from typing import Any

import torch

from s2ft.attached.record import unwrapped
from s2ft.config import S2FTConfig
from s2ft.distributed import reads_weights, will_be_loaded_again
from s2ft.layers import kind_of
from s2ft.packages import check_packages
from s2ft.text.models import load_model, locate
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
    dtype = more.pop("dtype", more.pop("torch_dtype", options.dtype))
    options = replace(options, dtype=str(dtype or "auto").removeprefix("torch."))  # which checks it
    quantization = more.pop("quantization_config", None) or quantization_config(options)
    more.setdefault("attn_implementation", options.attn_implementation)
    more.setdefault("distributed_config", loading_config(arguments))
    if quantization is not None and not arguments.use_cpu:
        more.setdefault("device_map", {"": arguments.device})
    elif will_be_loaded_again() and not locate(options.model_name_or_path)[1]:  # a GGUF file is unpacked by every rank
        # From 5.25 on transformers looks for kernels of the device that it loads to, and refuses the meta device.
        more.setdefault("use_kernels", False)
        if not reads_weights():
            more.setdefault("device_map", "meta")  # transformers 5.24 would read on every rank
    model, tokenizer = load_model(
        options.model_name_or_path,
        options.dtype,
        revision=more.pop("revision", options.model_revision),
        trust_remote_code=more.pop("trust_remote_code", getattr(arguments, "trust_remote_code", False)),
        quantization=quantization,
        keep_packed=options.keep_packed,
        **{key: value for key, value in more.items() if value is not None},
    )
    for name in ("eos_token", "pad_token"):
        token = getattr(arguments, name, None)
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"{name} {token!r} is not in the vocabulary of {options.model_name_or_path}")
            if name == "eos_token" and token != tokenizer.eos_token:
                logger.warning(
                    "adapters do not record eos_token: other commands stop at %r only if the chat template writes it",
                    token,
                )
            setattr(tokenizer, name, token)
    return model, tokenizer


def quantization_config(options: ModelOptions):
    """Return the quantization config of transformers for the options, or None.

    Args:
        options: How the model is loaded. A 4-bit layer multiplies in their dtype; "auto": in bfloat16.

    Raises:
        MissingPackages: bitsandbytes is not installed.

    Example:
        >>> from s2ft.train.base_model import quantization_config
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
        bnb_4bit_compute_dtype=torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype),
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
    is_packed = getattr(model, "hf_quantizer", None) or any(kind_of(module).read_only for module in model.modules())
    if chosen or config.layout == "indexed" or not is_packed:
        return config
    logger.info("layout indexed: weights that are quantized stay where they are")
    return replace(config, layout="indexed")


# ---- kernels --------------------------------------------------------------------------------------------


LEFT_TO_S2FT = ("swiglu", "geglu", "relu_squared", "cross_entropy", "fused_linear_cross_entropy")
WAY_OUT = "leave out --kernels liger"


def check_kernels(name: str) -> None:
    """Check that kernels can run here, before a model is loaded.

    Args:
        name: "s2ft" or "liger".

    Raises:
        ValueError: There is no GPU for the kernels.
        MissingPackages: Their package is not installed.
    """
    if name == "s2ft":
        return
    check_packages("kernels liger", WAY_OUT)
    # Triton's interpreter runs kernels on the CPU, thousands of times slower, for tests.
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"kernels liger need a GPU, and PyTorch finds none here: {WAY_OUT}")


def apply_kernels(model, name: str) -> None:
    """Let the frozen layers of a model run on kernels that :func:`check_kernels` allows.

    A model whose couplings are found by trials is attached before, since the trials run on the CPU.

    Liger-Kernel works on a GPU. It replaces norms and rotary positions in transformers' module of this type, so that
    models of the type that are made later in this process run on them too.

    Args:
        model: A model of transformers. Its device is the one to train on, or will be.
        name: "s2ft" changes nothing. "liger" takes norms and rotary positions from the package liger-kernel.

    Raises:
        ValueError: Liger-Kernel has nothing for this type of model.

    Example:
        >>> from s2ft.train.base_model import apply_kernels
        >>> apply_kernels(model, "s2ft")
    """
    if name == "s2ft":
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model = unwrapped(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"kernels liger: Liger-Kernel has none for models of type {kind!r}, only for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}: {WAY_OUT}"
        )
    _apply_liger_kernel_to_instance(model=model, **dict.fromkeys(LEFT_TO_S2FT, False))
