"""A writer of GGUF, the file format of llama.cpp: a merged model with its config and its tokenizer.

A family or a tokenizer is written only if llama.cpp is known to compute the same from every part of it. Others are
refused, and the message names the command of llama.cpp that converts a merged checkpoint. If the base is a GGUF file
itself, its metadata is copied, including the tokenizer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLAIN = ("F32", "F16", "BF16")
KINDS = (*PLAIN, "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # what the package gguf can quantize without llama.cpp
BLOCK = 32  # weights of one block of these quantizations
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}  # llama.cpp's names by model_type
COMMAND = "llama.cpp's convert_hf_to_gguf.py knows more: --llama-cpp DIR names the folder of llama.cpp"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of pre-tokenizers. The key is what tokenizer.json has: a regular expression, single digits before
# GPT-2's expression, or GPT-2's alone; then whether a word that is a token is used as one token (ignore_merges)
SPLITS = {
    ("split", WORDS + r"\p{N}{1,3}" + REST, True): "llama-bpe",
    ("split", WORDS + r"\p{N}" + REST, False): "qwen2",
    ("digits", None, False): "smollm",
    ("plain", None, False): "gpt-2",
}


def write(model, tokenizer, file: Path, base: Path | None = None, kind: str | None = None) -> None:
    """Write a plain, merged model. Tensors of one dimension are written in float32 for llama.cpp.

    Args:
        model: The model of transformers.
        tokenizer: Its tokenizer.
        file: The file to write.
        base: The GGUF file from which the model was loaded.
        kind: One of KINDS; default: the model's dtype.

    Raises:
        ValueError: llama.cpp may compute something else from the model or its tokenizer. Nothing has been written.
    """
    import gguf

    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ValueError(
            f"model type {config.model_type} is not written as GGUF here, only {', '.join(ARCHITECTURES)}: {COMMAND}"
        )
    tensors = dict(_tensors(model, architecture))
    reader = gguf.GGUFReader(base) if base is not None else None
    if reader is None:
        _check_config(config)
        metadata = {**_config(config, architecture), **_tokenizer(tokenizer, config)}
    writer = gguf.GGUFWriter(file, architecture)
    kind = kind or kind_of_dtype(model.dtype)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    if reader is not None:
        _copy(reader, writer, tensors, tokenizer.chat_template)
    else:
        for key, value in metadata.items():
            _add(writer, key, value)
    for name, tensor in tensors.items():
        _add_tensor(writer, name, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- tensors -------------------------------------------------------------------------------------------


def _tensors(model, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by their names in GGUF."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], model.config.num_hidden_layers)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        path, _, part = key.rpartition(".")
        name = names.get_name(path)
        if name is None:
            raise ValueError(f"{key} has no place in a GGUF file of architecture {architecture}: {COMMAND}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{key} has NaN or infinite values")
        last = path.rpartition(".")[2]
        if architecture == "llama" and last in heads:
            tensor = _interleaved(tensor, heads[last])
        yield f"{name}.{part}", tensor.detach().cpu()


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Interleave the two halves of each head's rows: llama.cpp rotates neighbours, transformers rotates the halves."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def kind_of_dtype(dtype: torch.dtype) -> str:
    """Return the type of weights that holds a dtype's values exactly."""
    return {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


def _add_tensor(writer, name: str, tensor: Tensor, kind: str) -> None:
    import gguf

    kind = _kind_for(name, tensor, kind)
    packed = gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])


def _kind_for(name: str, tensor: Tensor, kind: str) -> str:
    """Return the type of one tensor: llama.cpp wants vectors in float32, and rows of whole blocks.

    Embeddings and the output layer lose most by few bits, and have at least 8.
    """
    if tensor.dim() == 1:
        return "F32"
    if kind in PLAIN:
        return kind
    if tensor.shape[-1] % BLOCK:
        return "F16"
    return "Q8_0" if name in ("token_embd.weight", "output.weight") else kind


# ---- metadata ------------------------------------------------------------------------------------------


def _copy(reader, writer, tensors: dict[str, Tensor], chat_template: str | None) -> None:
    """Copy all metadata of a GGUF file, and the tensors that the model lacks (frequencies of positions).

    The chat template is the one that is given, which an adapter may have changed.
    """
    import gguf

    if chat_template and "tokenizer.chat_template" not in reader.fields:
        writer.add_string("tokenizer.chat_template", chat_template)

    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in (
            "general.architecture",
            "general.file_type",
            "general.quantization_version",
        ):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            is_template = field.name == "tokenizer.chat_template" and chat_template
            writer.add_key_value(field.name, chat_template if is_template else field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        if tensor.name not in tensors and tensor.name != "output.weight":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)


def _add(writer, key: str, value: Any) -> None:
    kinds = {
        bool: writer.add_bool,
        str: writer.add_string,
        int: writer.add_uint32,
        float: writer.add_float32,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def _check_config(config) -> None:
    """Raise ValueError for a config from which llama.cpp computes something else."""
    rope = getattr(config, "rope_parameters", None) or {}
    unusual = {
        f"positions scaled by {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        "biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        "a sliding window": getattr(config, "sliding_window", None) is not None
        and getattr(config, "use_sliding_window", True),
    }
    for what, found in unusual.items():
        if found:
            raise ValueError(f"a {config.model_type} with {what} is not written as GGUF here: {COMMAND}")


def _config(config, architecture: str) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 1e4)),
        "vocab_size": config.vocab_size,
    }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def _tokenizer(tokenizer, config) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer that splits words as one of SPLITS."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"a tokenizer without tokenizer.json is not written as GGUF here: {COMMAND}")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = content["model"]
    split = SPLITS.get((*_split(content), bool(bpe.get("ignore_merges"))))
    if (
        bpe["type"] != "BPE"
        or bpe.get("byte_fallback")
        or split is None
        or (content["normalizer"] or {}).get("type", "NFC") != "NFC"
    ):
        raise ValueError(
            f"a tokenizer of this kind is not written as GGUF here, only byte-level BPE that splits words as "
            f"{', '.join(SPLITS.values())}: {COMMAND}"
        )
    tokens, kinds = _tokens(tokenizer, config.vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    sample = tokenizer("a")["input_ids"]
    values = {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": kinds,
        "merges": merges,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
        "add_bos_token": sample[0] == tokenizer.bos_token_id,
        "add_eos_token": sample[-1] == tokenizer.eos_token_id,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None and value != []}
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _split(content: dict[str, Any]) -> tuple[str | None, str | None]:
    """Return ("split", regular expression), ("digits", None) or ("plain", None); (None, None) for any other way."""
    steps = content["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None, None
    if not before:
        return ("plain", None) if last.get("use_regex", True) else (None, None)
    first, gpt2 = before[0], last.get("use_regex", True)
    if first == {"type": "Digits", "individual_digits": True} and gpt2:
        return "digits", None
    if first.get("type") == "Split" and first.get("behavior") == "Isolated" and not first.get("invert") and not gpt2:
        return "split", first["pattern"].get("Regex")
    return None, None


def _tokens(tokenizer, size: int) -> tuple[list[str], list[int]]:
    """Return all tokens by number, and llama.cpp's kind of each: 1 normal, 3 control, 4 user-defined, 5 unused."""
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [5] * size
    for token, number in tokenizer.get_vocab().items():
        if number >= size:
            raise ValueError(f"the tokenizer has a token {number}, but the model has {size} tokens: {COMMAND}")
        tokens[number], kinds[number] = token, 1
    for number, added in tokenizer.added_tokens_decoder.items():
        kinds[number] = 3 if added.special else 4
    return tokens, kinds
