"""Attaches s2ft to a tiny random model of every model type that transformers maps, and writes what works.

Each type runs in a process of its own with limits of time and memory. A row says how FFN and attention are covered, and
whether the model computes the same after attach, trains, merges and loads its adapter again.

    python bench/model_types.py                     # all types
    python bench/model_types.py --only llama bert   # some
    python bench/model_types.py --resume            # those that have no row yet
"""

import argparse
import contextlib
import copy
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OUTPUT = Path(__file__).parent / "results" / "model_types.csv"
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
    "text-encoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
FIELDS = (
    *("type", "mappings", "class", "source", "ffn", "attention", "one_sided", "towers", "weights", "logits", "gradients"),
    *("merge", "adapter", "lora", "s2ft_peft", "seconds", "note"),
)
SECONDS, GIGABYTES = 240, 6
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}

# Entries that the default config of a class lacks, so that no model can be made from it or run. Configs of real
# checkpoints have them.
DEFAULTS: dict[str, dict] = {
    "chameleon": {"vocabulary_map": {}},
    "emu3": {"vocabulary_map": {}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + 31 * ["sparse"], "num_experts_per_tok": 2}},
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0, "text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"], "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "wav2vec2-bert": {"vocab_size": 40},
    "wav2vec2-conformer": {"vocab_size": 40},
    **{
        name: {"text_config": {"rope_parameters": MROPE}}
        for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm46v", "glm4v", "glm_ocr", "glmga")
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**MROPE, "mrope_section": [8, 4, 4], "partial_rotary_factor": 0.5}}},
}


def types() -> dict[str, list[tuple[str, str]]]:
    """For each model type its mappings with the model class."""
    from transformers.models.auto import modeling_auto

    found: dict[str, list[tuple[str, str]]] = {}
    for mapping, name in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, name).items():
            found.setdefault(model_type, []).append((mapping, names if isinstance(names, str) else names[0]))
    return found


def default_config(model_type: str):
    """The default config of a model type, with the entries that it lacks."""
    from transformers import CONFIG_MAPPING, BertConfig, ViTConfig, Wav2Vec2Config

    kind = CONFIG_MAPPING[model_type]
    decoder = {"is_decoder": True, "add_cross_attention": True}
    if model_type == "encoder-decoder":
        config = kind.from_encoder_decoder_configs(BertConfig(), BertConfig(**decoder))
    elif model_type == "vision-encoder-decoder":
        config = kind.from_encoder_decoder_configs(ViTConfig(), BertConfig(**decoder))
    elif model_type == "speech-encoder-decoder":
        config = kind.from_encoder_decoder_configs(Wav2Vec2Config(), BertConfig(**decoder))
    else:
        config = kind()
    if config.model_type.endswith("encoder-decoder"):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    if model_type not in DEFAULTS:
        return config
    return type(config).from_dict(_updated(config.to_dict(), DEFAULTS[model_type]))


def _updated(entries: dict, more: dict) -> dict:
    for key, value in more.items():
        nested = isinstance(value, dict) and isinstance(entries.get(key), dict) and key.endswith("_config")
        entries[key] = _updated(entries[key], value) if nested else copy.deepcopy(value)
    return entries


def tiny_model_of(model_type: str, dtype=None):
    """A tiny random model of a type, by the first mapping that has the type."""
    import torch
    import transformers

    from s2ft.model.discovery.tiny_config import Level, tiny_config
    from s2ft.model.discovery.twin import tiny_model

    model_class = getattr(transformers, types()[model_type][0][1])
    config, failures = default_config(model_type), []
    for level in Level:
        try:
            return tiny_model(model_class, tiny_config(config, level), dtype or torch.float32)
        except ImportError:
            raise
        except Exception as error:
            failures.append(f"{level.name}: {type(error).__name__}: {error}")
    raise ValueError("can't be built. " + "; ".join(failures))
