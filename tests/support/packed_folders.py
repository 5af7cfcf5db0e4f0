"""Checkpoints of compressed-tensors and in NF4 of bitsandbytes, made by these libraries from a checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def compress(
    checkpoint: Path, folder: Path, ignore: tuple[str, ...] = ("lm_head",), activations: dict | None = None, **weights
) -> Path:
    """Write a checkpoint of compressed-tensors. Returns the folder.

    Args:
        checkpoint: A checkpoint of transformers.
        folder: The folder to write.
        ignore: Names of layers that are not quantized.
        activations: What its config says of the layers' inputs, which an engine then quantizes too.
        weights: What its config says of the weights: num_bits, type, strategy, and so on.
    """
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors import quantization
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    settings = quantization.QuantizationConfig(
        config_groups={"all": scheme}, ignore=list(ignore), quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, settings)
    for layer in (layer for layer in model.modules() if hasattr(layer, "weight_scale")):
        arguments, weight = layer.quantization_scheme.weights, layer.weight.data
        tile = arguments.block_structure or [
            1 if weights["strategy"] != "tensor" else weight.shape[0],
            arguments.group_size or weight.shape[1],
        ]
        tiles = weight.float().unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
        least, most = tiles.amin((1, 3)), tiles.amax((1, 3))
        shared = generate_gparam(weight.min(), weight.max()) if hasattr(layer, "weight_global_scale") else None
        scale, zero = calculate_qparams(least, most, arguments, **({} if shared is None else {"global_scale": shared}))
        for name, value in {"weight_scale": scale, "weight_zero_point": zero, "weight_global_scale": shared}.items():
            if hasattr(layer, name):
                getattr(layer, name).data.copy_(value.reshape(getattr(layer, name).shape))
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def to_nf4(checkpoint: Path, folder: Path, nested: bool) -> Path:
    """Write a checkpoint in NF4. Returns the folder."""
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=settings
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder
