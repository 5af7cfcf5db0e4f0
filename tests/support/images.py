"""Tiny multimodal models with processors that are made in code, and rows with images for TRL."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from support.models import randomized

SIDE, PATCH = 16, 4  # of an image, in pixels
SPECIAL = ["<pad>", "<bos>", "<eos>", "<image>", "<start>", "<end>", "<video>"]
TEXT = dict(
    vocab_size=len(SPECIAL) + 256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
)
COLORS = ("red", "green", "blue", "black")


def _tokenizer() -> PreTrainedTokenizerFast:
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL))
    marks = {"image_token": SPECIAL[3], "boi_token": SPECIAL[4], "eoi_token": SPECIAL[5], "video_token": SPECIAL[6]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, extra_special_tokens=marks)


def _template(image: str) -> str:
    """A chat template, with the text that stands for an image."""
    part = f"{{% if c['type'] == 'image' %}}{image}{{% else %}}{{{{ c['text'] }}}}{{% endif %}}"
    return f"{{% for m in messages %}}{{% for c in m['content'] %}}{part}{{% endfor %}}<eos>{{% endfor %}}"


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Qwen2.5-VL: patches of images one after another, and a vision tower with windows."""
    sizes = dict(patch_size=PATCH, temporal_patch_size=2, merge_size=2, min_pixels=64, max_pixels=SIDE**2)
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen2VLVideoProcessor(**sizes)
    processor = Qwen2_5_VLProcessor(images, _tokenizer(), videos, chat_template=_template("<start><image><end>"))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=4, out_hidden_size=32, patch_size=PATCH)
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=3,
        vision_start_token_id=4,
        vision_end_token_id=5,
        video_token_id=6,
    )
    return randomized(SimpleNamespace(from_config=Qwen2_5_VLForConditionalGeneration), config), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Gemma 3: SigLIP, four tokens an image, and a mask that lets the tokens of an image see each other."""
    images = Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE})
    processor = Gemma3Processor(images, _tokenizer(), chat_template=_template("<start>"), image_seq_length=4)
    config = Gemma3Config(
        text_config={**TEXT, "head_dim": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=3,
        boi_token_index=4,
        eoi_token_index=5,
    )
    return randomized(SimpleNamespace(from_config=Gemma3ForConditionalGeneration), config), processor


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA: CLIP, whose last layer is not used."""
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size)
    processor = LlavaProcessor(
        images, _tokenizer(), PATCH, "default", _template("<image>"), num_additional_image_tokens=1
    )
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_id=3,
        image_token_index=3,
    )
    return randomized(SimpleNamespace(from_config=LlavaForConditionalGeneration), config), processor


MODELS = {"qwen2_5_vl": qwen2_5_vl, "gemma3": gemma3, "llava": llava}


def rows(count: int = 8) -> list[dict]:
    """Chats about an image, in TRL's format."""
    from PIL import Image

    colors = [COLORS[i % len(COLORS)] for i in range(count)]
    return [
        {
            "images": [Image.new("RGB", (SIDE, SIDE), color)],
            "messages": [{"role": "user", "content": "What color?"}, {"role": "assistant", "content": color}],
        }
        for color in colors
    ]


def batch(processor: ProcessorMixin, count: int = 4) -> dict[str, torch.Tensor]:
    """The inputs and labels of :func:`rows`, as the processor makes them."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    return dict(DataCollatorForVisionLanguageModeling(processor)(rows(count)))
