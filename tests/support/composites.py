"""Tiny models of the composite types, with an input that reaches their towers."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto import modeling_auto

from s2ft.model.discovery.examples import examples_of
from s2ft.model.discovery.tiny_config import tiny_config
from s2ft.model.discovery.twin import tiny_model
from s2ft.model.families import composite
from s2ft.model.modes import evaluation_mode

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}}
HALF = {**MROPE["rope_parameters"], "mrope_section": [8, 4, 4], "partial_rotary_factor": 0.5}
# entries that the default config of a class lacks, though configs of real checkpoints have them
LACKING: dict[str, dict] = {
    **dict.fromkeys(
        ("glm46v", "glm4v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl"),
        {"text_config": MROPE},
    ),
    **dict.fromkeys(("blip-2", "instructblip"), {"image_token_index": 50265}),
    "gemma3": {"vision_config": {"image_size": 256}},  # 256 tokens an image
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "glm4v_moe": {"text_config": {"rope_parameters": HALF}},
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), {"image_grid_pinpoints": [[112, 112]]}),
    "qwen2_audio": {"ignore_index": -100},
    **dict.fromkeys(("got_ocr2", "pp_chart2table"), {"vision_config": {"image_size": 128}}),
    "shieldgemma2": {"vision_config": {"image_size": 256}},
}


def missing(model_type: str) -> bool:
    """Whether this version of transformers lacks the model type."""
    return model_type not in CONFIG_MAPPING or _class_of(model_type) is None


def _class_of(model_type: str) -> str | None:
    for mapping in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM"):
        found = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).get(model_type)
        if found is not None:
            return found if isinstance(found, str) else found[0]
    return None


def composite_of(model_type: str, change: dict[str, dict] | None = None) -> PreTrainedModel:
    """A tiny model of the type with random norms and biases, in evaluation mode."""
    import transformers

    values = CONFIG_MAPPING[model_type]().to_dict()
    for part, entries in (*LACKING.get(model_type, {}).items(), *(change or {}).items()):
        values[part] = {**(values[part] or {}), **copy.deepcopy(entries)} if isinstance(entries, dict) else entries
    config = CONFIG_MAPPING[model_type].from_dict(values)
    return tiny_model(getattr(transformers, _class_of(model_type)), tiny_config(config))


def example_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """An input that reaches all towers.

    Raises:
        AssertionError: There is none.
    """
    parts = [part for _, part in composite._parts(model)]
    failures = []
    for example in examples_of(model):
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
    raise AssertionError(f"{type(model).__name__} runs on no input that reaches all towers: {failures}")


def labelled(example: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(example), "labels": example["input_ids"].clone()}
