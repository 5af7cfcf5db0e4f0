"""Builds the twin of a model: a tiny one with the same modules and random float64 weights, to try couplings on.

Sizes are cut by the names of their keys. What makes the modules differ stays: grouped queries stay grouped, one
key/value head stays one, and so many layers are kept that every kind of block is there.

On the twin a wrong coupling can't hide: no norm weight is 1, no bias is 0 and no matrix is zero. In float64 rounding
is a million times smaller than any real change.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft.distributed import full_shape, full_tensors, is_partitioned, without_zero_init

# ---- a small copy of a config ---------------------------------------------------------------------------------------

WIDTH, HEADS, HEAD_DIM = 64, 4, 16
FFN_WIDTH, EXPERT_WIDTH = 96, 48
VOCABULARY, POSITIONS = 256, 128
DEPTH = 3
SIDE = 8  # patches of an image in a row


Size = int | Callable[[int, str, dict], int]  # a size, or a function of the old size, its key and the config


def _key_value_heads(old: int, key: str, config: dict) -> int:
    """As many as heads if they were as many before, one if it was one, else half as many as heads."""
    prefixes = [key[: key.index("num_")]] if "num_" in key else []
    names = [prefix + name for prefix in (*prefixes, "") for name in _HEAD_KEYS]
    heads = next((config[name] for name in names if _is_size(config.get(name))), None)
    return min(old, HEADS if old == heads else 1 if old == 1 else HEADS // 2)


def _at_most(most: int) -> Size:
    return lambda old, key, config: min(old, most)


_HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads")

# Keys without their prefix (text_, vision_, ...) and the size that they get. The first match counts.
_WIDTHS: dict[str, Size] = {
    r"hidden_size|d_model|n_embd|embed_dim|model_dim|emb_dim|hidden_dim|embedding_size|embedding_dim|dim_model|width"
    r"|projection_dim|out_hidden_size|output_dim|output_hidden_size|proj_hidden_size|projection_hidden_size"
    r"|projector_hidden_size|aligner_hidden_size|backbone_hidden_size|attention_hidden_size|embed_size|embed_dims"
    r"|cross_attention_hidden_size|text_embed_dim|vision_embed_dim|vision_output_dim|text_dim|vision_dim|kv_dim"
    r"|lm_hidden_size|input_dim_text|d_embed|lru_width|d_latents|hidden_size_global|moe_hidden_size|ple_embed_dim"
    r"|adapter_in_dim|adapter_out_dim|adapter_input_size|image_token_embed_dim": WIDTH,
    # The width, or half of it if embeddings had another width before: then a layer projects them.
    r"word_embed_proj_dim": lambda old, key, config: WIDTH if old == config.get("hidden_size") else WIDTH // 2,
    r"base_channels": 32,
    r"hidden_size_per_layer_input": HEAD_DIM,
    r"intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|dense_intermediate_size|intermediate_dim"
    r"|linear_units|mlp_hidden_size|dim_ff|block_ff_dim|intermediate_size_mlp|mlp_intermediate_size"
    r"|abstractor_intermediate_size|feed_forward_size|swiglu_hidden|dim_feedforward|ff_dim|prefix_projection_size"
    r"|hidden_size_ffn|ffn_embed_dim|dense_ffn_hidden_size": FFN_WIDTH,
    r"moe_intermediate_size|shared_expert_intermediate_size|shared_intermediate_size|expert_ffn_hidden_size"
    r"|moe_shared_expert_intermediate_size|moe_ffn_hidden_size|moe_shared_intermediate_size|moe_latent_size"
    r"|expert_dim": EXPERT_WIDTH,
    r"mamba_d_ssm": 2 * WIDTH,
}
_HEAD_COUNTS_AND_DIMS: dict[str, Size] = {
    r"num_attention_heads|n_head|num_heads|n_heads|attention_heads|num_attn_heads|heads|num_query_heads"
    r"|swa_num_attention_heads|attention_num_heads|linear_num_heads|abstractor_num_heads"
    r"|resampler_n_heads": _at_most(HEADS),
    r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num|swa_num_key_value_heads|kv_heads"
    r"|num_global_key_value_heads|resampler_n_kv|attention_num_kv_heads": _key_value_heads,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads|ssm_num_heads": 8,
    r"mamba_n_groups|n_groups": _at_most(1),
    r"linear_num_key_heads": 2,
    r"linear_num_value_heads|index_n_heads": HEADS,
    r"head_dim|attention_head_dim|d_kv|kv_channels|global_head_dim|attention_head_size|swa_head_dim|head_size"
    r"|resampler_head_dim|attention_key_size|v_head_dim|swa_v_head_dim|qk_nope_head_dim|mamba_d_head"
    r"|mamba_head_dim|mamba_headdim|linear_key_head_dim|linear_value_head_dim|index_head_dim": HEAD_DIM,
    r"qk_rope_head_dim|rotary_dim": HEAD_DIM // 2,
    r"qk_head_dim": HEAD_DIM + HEAD_DIM // 2,
}
_OTHER_SIZES: dict[str, Size] = {
    r"q_lora_rank|kv_lora_rank|o_lora_rank": WIDTH // 2,
    r"n_group|topk_group|num_expert_group|num_expert_groups|topk_groups": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers|num_hash_layers": _at_most(1),
    r"max_position_embeddings|n_positions|max_target_positions|max_seq_len|n_ctx|max_sequence_length|seq_length"
    r"|max_seq_length|context_length|model_max_length|max_text_len": POSITIONS,
    r"max_source_positions": 64,
    r"mamba_d_state|state_size|ssm_state_size": 8,
    r"mamba_dt_rank|time_step_rank": 4,
    r"mamba_chunk_size|chunk_size": 16,
    r"index_topk": 16,
    r"sliding_window|attention_window_size|local_attention|swa_window_size": _at_most(32),
    r"num_image_tokens|num_latents": 16,
    r"num_res_blocks": _at_most(1),
    r"split_ngram_parts": _at_most(4),
}
_VOCABULARY_AND_EXPERTS: dict[str, Size] = {
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|moe_n_experts"
    r"|n_experts": _at_most(8),
    r"num_experts_per_tok|num_experts_per_token|moe_top_k|moe_topk|moe_k|top_k_experts|num_selected_experts|top_k"
    r"|experts_per_token|moe_router_topk|num_experts_per_topk|moe_num_active_primary_experts": _at_most(2),
    r"vocab_size|entity_vocab_size|codebook_size|n_vocab|vocab_size_per_layer_input|num_embeddings"
    r"|output_vocab_size|unpadded_vocab_size|ngram_vocab_size_base|encoder_hash_byte_group_vocab": VOCABULARY,
}


def _compiled(*tables: dict[str, Size]) -> list[tuple[re.Pattern, Size]]:
    prefix = r"(?:text_|vision_|audio_|encoder_|decoder_|cross_|num_encoder_|num_decoder_)?"
    return [(re.compile(f"{prefix}(?:{keys})"), size) for table in tables for keys, size in table.items()]


_RULES = {  # by whether widths are cut
    True: _compiled(_WIDTHS, _HEAD_COUNTS_AND_DIMS, _OTHER_SIZES, _VOCABULARY_AND_EXPERTS),
    False: _compiled(_VOCABULARY_AND_EXPERTS),
}

_DEPTH = re.compile(
    r"(text_|vision_|audio_|encoder_|decoder_|vit_)?(num_hidden_layers|n_layer|n_layers|num_layers|layers|num_blocks"
    r"|depth|num_encoder_layers|num_decoder_layers|num_transformer_layers|num_block|num_conv_pos_layers)"
)
_PER_LAYER = re.compile("layer|rope|pattern|type|interval|moe|mlp|block")  # lists with an entry for each layer
_LAYERS = re.compile(r"layer|block")  # lists with the numbers of layers
_TOKEN = re.compile(r".*(token_id|token_index|_token|_idx|token_ids|_id)")

# Entries that describe the checkpoint, or that follow from the others.
_LEFT_OUT = (
    *("stage_names", "out_features", "out_indices", "_out_features", "_out_indices", "transformers_version"),
    *("_name_or_path", "architectures", "torch_dtype", "dtype", "quantization_config", "per_layer_config_overrides"),
)
_AS_IT_IS = ("id2label", "label2id")

# Entries that the rules above get wrong, by model type and dotted key: a value, or a function of the cut config. They
# are used where widths are cut, for a config and for the configs inside it, and only where the key exists.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # The width of a later stage is a multiple of that of the first, and must be divisible by its heads 3, 6, 12, 24.
    **{name: {"embed_dim": 48} for name in ("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr")},
    "florence_vision": {
        "embed_dim": [16, 32, 64, 64],
        "num_heads": [2, 2, 4, 4],
        "num_groups": [2, 2, 4, 4],
        "depths": [1, 1, 2, 1],
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 64},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16, 32, 32, 64]},  # one width for each stage
    # Attention in its last stage, of 1/32 of the image's side, has more than one token then.
    "mobilevit": {"image_size": 128},
    "deepseek_v4": {"compress_rates.heavily_compressed_attention": 8},  # less than the length of an input
    "mimi": {"upsample_groups": WIDTH},  # one group for each channel
    "wavtokenizer_encoder": {"codebook_dim": WIDTH},
    # The tokens of images end where those of sound begin.
    "apertus1p5": {
        "image_token_offset": 100,
        "audio_token_offset": 164,
        "vision_config.codebook_size": 64,
        "audio_config.codebook_size": 64,
    },
    # State spaces: expansion times width is heads times their width.
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "zamba2": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
        "kv_channels": HEAD_DIM,
        "num_query_groups": HEADS,
        "hybrid_layer_ids": lambda config: [
            i for i, kind in enumerate(config["layers_block_type"]) if kind == "hybrid"
        ],
    },
    # Layers of a kind are given by a period or by numbers, which a shallow model would not reach.
    "jamba": {"attn_layer_offset": 2, "attn_layer_period": 4},
    "qwen4_exp_text": {"indexer_head_dim": HEAD_DIM, "indexer_budget": 16},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],  # the second shares weights
        "num_hidden_layers": 4,
    },
    "bamba": {"attn_layer_indices": [1]},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [1]},
    # Its dict names attention and FFN of a layer as two layers.
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": lambda c: 2 * c["H_cycles"] * (c["L_cycles"] + 1)},
    "blenderbot": {"decoder_layers": 2},  # the cache of its decoder has as many layers as its encoder
    # Parts that must fit together.
    "aria": {"projector_patch_to_query_dict": {7**2: 16, SIDE**2: 16}},
    "dots3_note_text": {"head_dim": HEAD_DIM + HEAD_DIM // 2},
    "mistral4": {"qk_nope_head_dim": HEAD_DIM // 2, "qk_head_dim": HEAD_DIM, "head_dim": HEAD_DIM},  # half is rotated
    "fun_asr_nano": {"adaptor_config.intermediate_size": WIDTH // 4},
}


def tiny_config(config: Any, widths: bool = True, depth: int = DEPTH) -> Any:
    """Make a small copy of a config.

    Args:
        config: A config of transformers.
        widths: Whether to cut widths and heads too, not only depth, vocabulary and number of experts. Where sizes
            depend on each other in unusual ways, they have to stay.
        depth: Number of layers of each stack.

    Returns:
        A config of the same class.
    """
    entries = {key: value for key, value in copy.deepcopy(config.to_dict()).items() if key not in _LEFT_OUT}
    if widths:
        _make_images_small(entries)
    entries = _cut(entries, widths, depth)
    _renumber_tokens(entries)
    return type(config).from_dict(entries)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _cut(entries: dict, widths: bool, depth: int) -> dict:
    """Cut the sizes of a config given as a dict, and of the configs inside it."""
    if any(not isinstance(key, str) for key in entries):
        return entries
    layers = entries.get("num_hidden_layers")
    entries = _shallow(copy.deepcopy(entries), depth, widths)
    if entries.get("num_kv_shared_layers") and entries.get("num_hidden_layers") != layers:
        entries["num_kv_shared_layers"] = 0  # the layers whose keys and values others use may be gone
    cut = {key: _cut_entry(key, value, entries, widths, depth) for key, value in entries.items()}
    if widths:
        _keep_parts_of_heads(entries, cut)
        for key, value in EXCEPTIONS.get(entries.get("model_type", ""), {}).items():
            _set(cut, key, value(cut) if callable(value) else copy.deepcopy(value))
    return cut


def _make_images_small(entries: dict) -> None:
    """Cut images to SIDE patches a side, in a config or in one inside it, with the numbers of tokens for an image."""
    inside = [value for value in entries.values() if isinstance(value, dict)]
    for vision in filter(_can_be_smaller, [entries, *inside]):
        old, patch = vision["image_size"], vision["patch_size"]
        whole = old[0] if isinstance(old, list) else old
        vision["image_size"] = [SIDE * patch] * len(old) if isinstance(old, list) else SIDE * patch
        if isinstance(entries.get("image_grid_pinpoints"), list):  # sizes of pictures that are cut into images
            entries["image_grid_pinpoints"] = [
                [side * SIDE * patch // whole for side in sides] for sides in entries["image_grid_pinpoints"]
            ]
        for key in ("mm_tokens_per_image", "image_seq_length", "image_seq_len"):
            if _is_size(entries.get(key)):
                entries[key] = max(1, entries[key] * SIDE**2 // (whole // patch) ** 2)
    for config in inside:
        _make_images_small(config)


def _can_be_smaller(entries: dict) -> bool:
    """Whether images are cut into one grid of patches: no windows, no stages, no fixed table of another size."""
    size, patch = entries.get("image_size", 0), entries.get("patch_size", 0)
    sides = size if isinstance(size, list) else [size]
    squares = all(_is_size(side) for side in sides) and len(set(sides)) == 1 and _is_size(patch)
    stages = any("window" in str(key) or key in ("depths", "num_position_embeddings") for key in entries)
    return squares and sides[0] > SIDE * patch and not stages


def _set(entries: dict, dotted: str, value: Any) -> None:
    """Set an entry of a config, or of a config inside it, that exists."""
    *inside, key = dotted.split(".")
    for name in inside:
        entries = entries.get(name) or {}
    if key in entries:
        entries[key] = value


def _cut_entry(key: str, value: Any, entries: dict, widths: bool, depth: int) -> Any:
    if key in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
        return _rope(value, (HEAD_DIM // 2 if entries.get("kv_lora_rank") else HEAD_DIM) // 2) if widths else value
    if key in _AS_IT_IS:
        return value
    if key == "use_cache":
        return False  # some caches ask for entries that configs lack, and a forward needs none
    if isinstance(value, dict):
        return _cut(value, widths, depth)
    is_list_of_widths = "intermediate_size" in key and widths
    if isinstance(value, list) and (is_list_of_widths or all(isinstance(entry, dict) for entry in value)):
        return [_cut_entry(key, entry, entries, widths, depth) for entry in value]
    if not _is_size(value):
        return value
    size = next((size for keys, size in _RULES[widths] if keys.fullmatch(key)), value)
    return size(value, key, entries) if callable(size) else size


def _shallow(entries: dict, depth: int, widths: bool) -> dict:
    """Cut the number of layers, with the lists that have an entry for each layer or the numbers of some."""
    for key in [key for key, value in entries.items() if _DEPTH.fullmatch(key) and _is_size(value)]:
        count = entries[key]
        for name, value in entries.items():
            if _has_entry_per_layer(name, value, count):
                entries[name] = value[:depth]
            elif _names_layers(name, value, count):
                entries[name] = [layer for layer in value if layer < depth]
        if isinstance(layers := entries.get("per_layer_config"), dict):
            kept = {i: config for i, config in layers.items() if int(i) < depth}
            entries["per_layer_config"] = {i: _cut(config, widths, DEPTH) for i, config in kept.items()}
        entries[key] = min(count, depth)
    return entries


def _has_entry_per_layer(name: str, value: Any, count: int) -> bool:
    fits = isinstance(value, (list, tuple)) and len(value) == count and "depths" not in name and "mrope" not in name
    return fits and (count > 9 or all(isinstance(entry, str) for entry in value) or bool(_PER_LAYER.search(name)))


def _names_layers(name: str, value: Any, count: int) -> bool:
    """Whether a list has the numbers of some layers, in ascending order, as in `mlp_only_layers`."""
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) < count
    if not is_list or not _LAYERS.search(name) or _DEPTH.fullmatch(name):
        return False
    numbers = all(isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < count for entry in value)
    return numbers and list(value) == sorted(set(value))


def _rope(entries: dict, frequencies: int) -> dict:
    """Cut what position embeddings say about the frequencies of a head, and about sections of them."""
    for key, value in entries.items():
        if isinstance(value, dict):
            entries[key] = _rope(value, frequencies)
        elif key == "mrope_section" and value:
            # About the same shares as before, at least 1 each
            total = round(frequencies * entries.get("partial_rotary_factor", 1))
            entries[key] = [max(1, total * section // sum(value)) for section in value]
            entries[key][-1] += total - sum(entries[key])
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            entries[key] = [1.0] * frequencies
        elif key == "original_max_position_embeddings" and _is_size(value):
            entries[key] = POSITIONS // 2
    return entries


def _keep_parts_of_heads(old: dict, new: dict) -> None:
    """With latent attention, head_dim is the part of a head that is rotated, or the whole."""
    rotated, rest = old.get("qk_rope_head_dim", 0), old.get("qk_nope_head_dim", 0)
    if old.get("kv_lora_rank") and _is_size(rotated) and _is_size(old.get("head_dim")):
        whole = _is_size(rest) and old["head_dim"] == rotated + rest
        new["head_dim"] = new["qk_rope_head_dim"] + (new["qk_nope_head_dim"] if whole else 0)


def token_entries(entries: dict) -> Iterator[tuple[dict, str]]:
    """Iterate over the tokens, and lists of them, in a config and the configs inside: the dict and the key."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from token_entries(value)
        elif isinstance(key, str) and _TOKEN.fullmatch(key):
            yield entries, key


def _renumber_tokens(entries: dict) -> None:
    """Give tokens outside the small vocabulary ids inside it: one id the same everywhere, two ids different ones."""
    new: dict[int, int] = {}

    def small(token: Any) -> Any:
        is_outside = _is_size(token) and token >= VOCABULARY - 1
        return new.setdefault(token, VOCABULARY - 2 - len(new) % 60) if is_outside else token

    for inside, key in token_entries(entries):
        value = inside[key]
        inside[key] = [*map(small, value)] if isinstance(value, list) else small(value)


# ---- a small copy of a model ----------------------------------------------------------------------------------------


MOST = 60_000_000  # parameters of a twin: 0.5 GB
COPIED_AT_ONCE = 1_000_000  # a model that is this small needs no smaller twin
MOST_COPIED = 500_000_000  # parameters of a model that is copied in float64 where no smaller twin can be built: 4 GB
DEPTHS = (DEPTH, 6, 12, 128)
SPREAD = 0.2  # of what is added to norm weights and biases
_LOW = (torch.float32, torch.float16, torch.bfloat16)


def twins_of(model: nn.Module, tried: list[str]) -> Iterator[nn.Module]:
    """Iterate over twins of a model, the smallest first, and append to `tried` why others can't be built.

    A twin has modules of the same classes as the model, under the same paths, apart from numbers in them. It is on the
    CPU, in float64 and in evaluation mode. The model and the global random state stay as they are.

    Args:
        model: The model. Its weights may be quantized, in half precision, on another device, or on meta.
        tried: Gets what failed, in words.
    """
    size = sum(full_shape(parameter).numel() for parameter in model.parameters())
    if size <= COPIED_AT_ONCE and not any(p.is_meta for p in model.parameters()) and not _is_quantized(model):
        yield copied(model)
        return
    wanted, rows = paths_and_classes(model), kinds_of_blocks(model)
    if hasattr(type(model), "_from_config") and getattr(model, "config", None) is not None:
        for widths in (True, False):
            twin = _same_at_some_depth(model, widths, wanted, rows, tried)
            if twin is not None:
                yield twin
    if _is_quantized(model):
        tried.append("a copy of the model: its weights are quantized")
    elif size > MOST_COPIED:
        tried.append(f"a copy of the model: {size / 1e9:.1f} billion parameters are too many in float64")
    else:
        yield copied(model)


def _same_at_some_depth(model: nn.Module, widths: bool, wanted: set, kinds: set, tried: list[str]) -> nn.Module | None:
    """The twin of the least depth with all kinds of blocks, else of the least with all paths; None if there is none."""
    second, cut = None, "small widths" if widths else "the widths of the model"
    for depth in DEPTHS:
        try:
            twin = tiny_model(type(model), tiny_config(model.config, widths, depth), torch.float64)
        except Exception as error:  # configs fail in many ways; every one only rules this cut out
            tried.append(f"{cut} with {depth} layers: {type(error).__name__}: {str(error)[:200]}")
            continue
        missing = wanted ^ paths_and_classes(twin)
        if missing:
            tried.append(f"{cut} with {depth} layers: other modules than the model, such as {min(missing)}")
        elif kinds == kinds_of_blocks(twin):
            return twin
        else:
            second = second or twin
    return second


def tiny_model(model_class: Any, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model from a tiny config, with random weights of which none is special.

    Args:
        model_class: A model class of transformers.
        config: Its config, cut by :func:`tiny_config`.
        dtype: Type of the weights. With float64 the forward computes in float64 wherever the model asks for less.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ValueError: The model would have more than 60 million parameters.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), without_zero_init():
        torch.random.default_generator.manual_seed(0)
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            shadow = model_class._from_config(copy.deepcopy(config), dtype=dtype)
        size = sum(parameter.numel() for parameter in shadow.parameters())
        if size > MOST:
            raise ValueError(f"{size / 1e6:.0f} million parameters, at most {MOST / 1e6:.0f}")
        with torch.device("cpu"):
            model = model_class._from_config(config, dtype=dtype)
    return _prepared(model, dtype)


def copied(model: nn.Module) -> nn.Module:
    """A float64 copy of a model. Weights on meta become random ones."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
            twin = copy.deepcopy(model).to_empty(device="cpu")
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.is_floating_point():
                    tensor.detach().zero_()
        else:
            partitioned = {str(id(one)): one for one in model.parameters() if is_partitioned(one)}  # by ZeRO-3
            memo = {int(key): nn.Parameter(value) for key, value in full_tensors(partitioned).items()}
            for one in model.parameters():  # a copy beside the model may not fit its GPU
                if one.is_cuda and type(one) is nn.Parameter and id(one) not in memo:
                    memo[id(one)] = nn.Parameter(one.detach().cpu(), one.requires_grad)
            twin = copy.deepcopy(model, memo).to("cpu")
    return _prepared(twin, torch.float64)


def _prepared(model: Any, dtype: torch.dtype) -> nn.Module:
    # The `to` of a module would drop the imaginary parts of complex tensors.
    model = model._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    model = model._apply(lambda tensor: tensor.to(dtype.to_complex()) if tensor.is_complex() else tensor)
    model = model.eval().requires_grad_(True)
    make_general(model)
    if dtype == torch.float64:
        if getattr(getattr(model, "config", None), "_attn_implementation", None) not in (None, "eager", "sdpa"):
            model.set_attn_implementation("eager")  # other kernels need a GPU or half precision
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")  # the grouped matrix product of PyTorch takes no float64
        model.forward = update_wrapper(partial(_in_float64, model.forward), model.forward)
    return model


# ---- weights of which none is special ---------------------------------------------------------------------


def make_general(model: nn.Module) -> None:
    """Change weights so that none is special: no norm weight of 1, no bias of 0, no matrix that hardly matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                noise = _normal(parameter, generator)
                if not bool(torch.isfinite(parameter).all()) or float(parameter.abs().max()) > 1e4:
                    parameter.zero_()  # memory that nobody has initialized
                if parameter.dim() < 2:
                    parameter.add_(SPREAD * noise)
                else:
                    inputs = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
                    parameter.copy_(inputs**-0.5 * noise)
        for path, buffer in model.state_dict(keep_vars=True).items():
            if _is_trained_buffer(buffer):
                buffer += SPREAD * _normal(buffer, generator) * (0.1 if path.endswith("running_var") else 1)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)


def _is_trained_buffer(saved: Any) -> bool:
    """Whether what a model saves is a buffer that counts as a weight: a vector of moderate numbers."""
    return (
        isinstance(saved, Tensor)
        and not isinstance(saved, nn.Parameter)
        and saved.dim() == 1
        and saved.numel() > 0
        and saved.is_floating_point()
        and float(saved.abs().max()) < 1e3  # NaN is not below
    )


# ---- float64 in the forward ---------------------------------------------------------------------------------


class _InFloat64(TorchDispatchMode):
    """Computes in float64 where a model asks for float32 or less, as norms and rotary embeddings do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _LOW:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _in_float64(forward: Callable, *args: Any, **options: Any) -> Any:
    """Run a forward in float64. It is no pair of hooks, which PyTorch leaves out after an interrupt."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            return forward(*args, **options)
    finally:
        torch.set_default_dtype(default)


# ---- structure --------------------------------------------------------------------------------------------


def paths_and_classes(model: nn.Module) -> set[tuple[str, str]]:
    """The paths of all modules, with * for every number, and the names of their classes."""
    return {  # quantizers replace the class of a linear layer
        (re.sub(r"\d+", "*", path), "Linear" if isinstance(module, nn.Linear) else type(module).__name__)
        for path, module in model.named_modules()
    }


def kinds_of_blocks(model: nn.Module) -> set[tuple[str, frozenset]]:
    """The kinds of blocks in every list of modules: what modules such a block has."""
    return {
        (re.sub(r"\d+", "*", f"{path}.{name}"), frozenset(paths_and_classes(block)))
        for path, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for name, block in stack.named_children()
    }


def _is_quantized(model: nn.Module) -> bool:
    """Whether weights are integers, or tensors of a class of their own as those of torchao."""
    return bool(getattr(model, "is_quantized", False)) or any(
        not parameter.is_floating_point() or type(parameter.data) is not Tensor for parameter in model.parameters()
    )
