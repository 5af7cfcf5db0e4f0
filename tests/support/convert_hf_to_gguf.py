"""A stand-in for llama.cpp's converter: it writes a small LLaMA with a byte-level tokenizer, in any type with a codec."""

import json
import sys
from pathlib import Path

import gguf
import numpy
import torch
from safetensors.numpy import load_file


def convert(checkpoint: Path, file: Path, kind: str = "f32") -> Path:
    """Write a checkpoint of transformers as a GGUF file. Returns the file."""
    config, words = (json.loads((checkpoint / name).read_text()) for name in ("config.json", "tokenizer.json"))
    writer = gguf.GGUFWriter(file, "llama")
    heads, size, layers = config["num_attention_heads"], config["vocab_size"], config["num_hidden_layers"]
    writer.add_context_length(config["max_position_embeddings"]), writer.add_block_count(layers)
    writer.add_embedding_length(config["hidden_size"]), writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads), writer.add_head_count_kv(config["num_key_value_heads"]), writer.add_vocab_size(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"]), writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, number in words["model"]["vocab"].items():
        tokens[number], kinds[number] = token, 1
    for added in words["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens), writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in words["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"]), writer.add_eos_token_id(config["eos_token_id"])
    template = checkpoint / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for key, values in load_file(checkpoint / "model.safetensors").items():
        path, _, part = key.rpartition(".")
        if path.endswith(("q_proj", "k_proj")):  # llama.cpp rotates neighbours, transformers rotates the halves
            count = heads if path.endswith("q_proj") else config["num_key_value_heads"]
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        packed = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind.upper()]
        writer.add_tensor(f"{names.get_name(path)}.{part}", quantized(values, packed), raw_dtype=packed)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return file


def quantized(values: numpy.ndarray, kind: gguf.GGMLQuantizationType) -> numpy.ndarray:
    """The bytes of a weight. K-quants, which the package gguf only reads, get random scales."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        from support.inside import TYPES_OF_GGUF  # in a process of llama.cpp's converter there is none

        codec, length = TYPES_OF_GGUF[kind.name], gguf.GGML_QUANT_SIZES[kind][0]
        shape = (*values.shape[:-1], values.shape[-1] // length, codec.size)
        data = numpy.random.default_rng(0).integers(0, 256, shape, numpy.uint8)
        sizes = {"Q6_K": {208: 1.5e-5}, "IQ4_NL": {0: 5e-4}}.get(kind.name, {0: 6e-5, 2: 5e-4})
        for place, size in sizes.items():
            data[..., place : place + 2] = numpy.array([size], numpy.float16).view(numpy.uint8)
        packed = torch.from_numpy(data).flatten(-2)
        return codec.pack(codec.nearest(torch.from_numpy(values), codec.unpack(packed)), packed).numpy()


if __name__ == "__main__":
    source, file, kind = sys.argv[1], sys.argv[3], sys.argv[5]
    convert(Path(source), Path(file), kind)
