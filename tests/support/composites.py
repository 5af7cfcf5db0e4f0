"""Tiny models of the composite types, with an input that reaches their towers."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel, __version__
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto import modeling_auto

from support.inside import (
    composite,
    evaluation_mode,
    examples_examples_of as examples_of,
    is_too_old,
    tiny_config,
    tiny_model,
)

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
HALF = {**MROPE["rope_parameters"], "mrope_section": [8, 4, 4], "partial_rotary_factor": 0.5}
# entries that the default config of a class lacks, though configs of real checkpoints have them
LACKING: dict[str, dict] = {
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"),
        {"text_config": {**MROPE, "pad_token_id": 0}},
    ),
    "llama4": {"pad_token_id": 0},
    "qwen3_vl_moe": {"text_config": {"pad_token_id": 0}},
    **dict.fromkeys(("blip-2", "instructblip"), {"image_token_index": 50265}),
    "gemma3": {"vision_config": {"image_size": 256}},  # 256 tokens an image
    "internvl": {"vision_config": {"image_size": [56, 56]}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "glm4v_moe": {"text_config": {"rope_parameters": HALF}},
    "qwen2_audio": {"ignore_index": -100},
    "qwen2_5_omni_thinker": {"text_config": MROPE, "vision_start_token_id": 151652},
    "voxtral": {"audio_token_id": 24},
    "vipllava": {"vision_feature_layers": [-2, 0]},
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), {"vision_config": {"image_size": 128}}),
    "shieldgemma2": {"vision_config": {"image_size": 256}},
}
# entries of the tiny config that depend on each other
TINY: dict[str, Callable[[Any], dict[str, dict]]] = {
    "aria": lambda config: {"": {"projector_patch_to_query_dict": {49: 16}}},
    **dict.fromkeys(
        ("blip-2", "instructblip"),
        lambda config: {"text_config": {"word_embed_proj_dim": config.text_config.hidden_size}},
    ),
    "llama4": lambda config: {
        "vision_config": {
            "intermediate_size": 4 * config.vision_config.hidden_size,
            "projector_input_dim": config.vision_config.vision_output_dim,
            "projector_output_dim": config.vision_config.vision_output_dim,
        }
    },
    "mllama": lambda config: {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {
            "intermediate_layers_indices": [0],
            "vision_output_dim": 2 * config.vision_config.hidden_size,
        },
    },
    "voxtral": lambda config: {"audio_config": {"intermediate_size": 4 * config.audio_config.hidden_size}},
}


def missing(model_type: str) -> bool:
    """Whether this release of transformers lacks the model type, or is too old for the family of a part."""
    if model_type not in CONFIG_MAPPING or _class_of(model_type) is None:
        return True
    return any(is_too_old(__version__, part) for part in _parts_of(model_type))


def _class_of(model_type: str) -> str | None:
    for mapping in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM"):
        found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).get(model_type)
        if found is not None:
            return found if isinstance(found, str) else found[0]
    return None


def part_types() -> set[str]:
    """The model types of the parts of all composite types."""
    return {part for model_type in composite.PROJECTORS if not missing(model_type) for part in _parts_of(model_type)}


def _parts_of(model_type: str) -> list[str]:
    config = _config_of(model_type)
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [composite.part_type(config, part) for part in parts if part is not None]


def composite_of(model_type: str, change: dict[str, dict] | None = None) -> PreTrainedModel:
    """A tiny model of the type with random norms and biases, in evaluation mode. Skips the test if it is missing."""
    import transformers

    if missing(model_type):
        pytest.skip(f"transformers {__version__} does not have the model type {model_type}")
    config = tiny_config(_config_of(model_type, change))
    for part, entries in TINY.get(model_type, lambda _: {})(config).items():
        for key, value in entries.items():
            setattr(getattr(config, part) if part else config, key, value)
    if model_type == "llama4":  # transformers 5.24 reads this from an output that lacks it
        MoeCausalLMOutputWithPast.image_outputs = None
    return tiny_model(getattr(transformers, _class_of(model_type)), config)


def _config_of(model_type: str, change: dict[str, dict] | None = None):
    values = CONFIG_MAPPING[model_type]().to_dict()
    for part, entries in (*LACKING.get(model_type, {}).items(), *(change or {}).items()):
        values[part] = {**(values[part] or {}), **copy.deepcopy(entries)} if isinstance(entries, dict) else entries
    return CONFIG_MAPPING[model_type].from_dict(values)


def example_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """An input that reaches all towers.

    Raises:
        AssertionError: There is none.
    """
    parts = [part for _, part in composite._parts(model)]
    failures = []
    for example in (*_own_examples(model), *examples_of(model)):
        reached: set[nn.Module] = set()
        hooks = [part.register_forward_hook(lambda module, *_: reached.add(module)) for part in parts]
        try:
            with torch.no_grad(), evaluation_mode(model):
                model(**copy.deepcopy(example))
        except Exception as error:  # another input may fit
            failures.append(f"{type(error).__name__}: {error}"[:120])
        finally:
            for hook in hooks:
                hook.remove()
        if len(reached) == len(parts) and "input_ids" in example:
            return example
    raise AssertionError(
        f"{type(model).__name__} runs on no input that reaches all towers: {sorted(set(failures))[:5]}"
    )


def _own_examples(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs of types with a layout of their own."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    tokens = torch.randint(3, text.vocab_size - 8, (2, 12), generator=generator)
    if config.model_type == "mllama":
        side, tiles = vision.image_size, vision.max_num_tiles
        yield {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": torch.randn(2, 1, tiles, 3, side, side, generator=generator),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.int64),
            "aspect_ratio_mask": torch.ones(2, 1, tiles, dtype=torch.int64),
            "cross_attention_mask": torch.ones(2, 12, 1, tiles, dtype=torch.int64),
        }
    if config.model_type in ("blip-2", "instructblip", "llama4"):
        image = torch.full((2, getattr(config, "num_query_tokens", 16)), config.image_token_index)
        own = {"input_ids": torch.cat([image, tokens], dim=1)}
        pixels = torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)
        question = {"qformer_input_ids": tokens} if config.model_type == "instructblip" else {}
        yield {**own, "attention_mask": torch.ones_like(own["input_ids"]), "pixel_values": pixels, **question}


@torch.no_grad()
def logits_of(model: PreTrainedModel, example: dict[str, Any]) -> torch.Tensor:
    return model(**copy.deepcopy(example)).logits


def loss_of(model: PreTrainedModel, example: dict[str, Any]) -> torch.Tensor:
    return model(**copy.deepcopy(example), labels=example["input_ids"].clone()).loss
