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
    add_tokens(writer, config, words)
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


def add_tokens(writer: gguf.GGUFWriter, config: dict, words: dict) -> None:
    """Write the tokenizer that tokenizer.json describes."""
    tokens, kinds = [f"[PAD{i}]" for i in range(config["vocab_size"])], [5] * config["vocab_size"]
    for token, number in words["model"]["vocab"].items():
        tokens[number], kinds[number] = token, 1
    for added in words["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens), writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in words["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"]), writer.add_eos_token_id(config["eos_token_id"])


QWEN35 = {  # settings of a tiny Qwen3.5, by their names behind the architecture's
    "context_length": 128, "block_count": 2, "embedding_length": 64, "feed_forward_length": 64, "full_attention_interval": 2,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32, "attention.value_length": 32,
    "rope.dimension_count": 8, "ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": 2, "ssm.time_step_rank": 4,
    "ssm.inner_size": 128,
}  # fmt: skip
OF_FFN = {"ffn_gate": (64, 64), "ffn_up": (64, 64), "ffn_down": (64, 64)}
OF_LAYERS = (  # a layer of linear attention, in which 4 value heads share 2 key heads, and one of attention
    {"attn_qkv": (256, 64), "attn_gate": (128, 64), "ssm_alpha": (4, 64), "ssm_beta": (4, 64), "ssm_conv1d": (256, 4)}
    | {"ssm_norm": (32,), "ssm_out": (64, 128), "ssm_a": (4,), "ssm_dt.bias": (4,)},
    {"attn_q": (128, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    | {"attn_q_norm": (32,), "attn_k_norm": (32,)},
)


def random_qwen35(checkpoint: Path, file: Path) -> Path:
    """Write a Qwen3.5 with random weights in Q8_0, as llama.cpp lays it out, and the tokenizer of a checkpoint."""
    config, words = (json.loads((checkpoint / name).read_text()) for name in ("config.json", "tokenizer.json"))
    writer, values = gguf.GGUFWriter(file, "qwen35"), numpy.random.default_rng(0)
    for name, value in QWEN35.items():
        writer.add_uint32(f"qwen35.{name}", value)
    writer.add_layer_norm_rms_eps(1e-6), writer.add_rope_freq_base(1e4)
    writer.add_array("qwen35.rope.dimension_sections", [2, 1, 1, 0])
    add_tokens(writer, config, words)
    norms = {"attn_norm": (64,), "post_attention_norm": (64,)}
    shapes = {
        f"blk.{i}.{name}": shape for i, one in enumerate(OF_LAYERS) for name, shape in (one | OF_FFN | norms).items()
    }
    for name, shape in {"token_embd": (config["vocab_size"], 64), "output_norm": (64,), **shapes}.items():
        packed = gguf.GGMLQuantizationType["Q8_0" if len(shape) == 2 and shape[1] % 32 == 0 else "F32"]
        numbers = values.standard_normal(shape).astype(numpy.float32) * (0.1 if len(shape) == 2 else -0.5)
        numbers = -abs(numbers) if name.endswith("ssm_a") else numbers
        tensor = name if name.endswith(("ssm_a", "bias")) else f"{name}.weight"
        writer.add_tensor(tensor, quantized(numbers, packed), raw_dtype=packed)
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
