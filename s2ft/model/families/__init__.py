"""Model families: which function lists the couplings of which model type.

This file has the table, and the models of several parts: a language model, a vision tower or an audio encoder, and a
projector between them. Such a model has the couplings of its parts, each under the part's path, and the FFN of its
projector, if that is two linear layers with an activation. Layers are counted through the language model, then the
towers, then the projector.

Layers of a vision tower that the model computes but does not use are left out, because their slices get no gradient:
those after the last `vision_feature_layer`, and a pooling head.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from packaging.version import Version
from torch import nn

from s2ft.model.coupling import Coupling, Projection
from s2ft.model.families import decoders, named
from s2ft.model.families.decoders import BY_FUNCTION
from s2ft.model.parts import in_one_weight

# model type → the function that lists the couplings of such a model; composite models are added below
FAMILIES: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    **dict.fromkeys(decoders.MODEL_TYPES, decoders.couplings),
    **dict.fromkeys(named.MODEL_TYPES, named.couplings),
    **BY_FUNCTION,
}

# model type → the first release of transformers whose models have the modules that its function describes, if that is
# later than the first one that s2ft works with, see pyproject.toml
SINCE = {
    **dict.fromkeys(("hunyuan_v1_moe", "phimoe"), "5.1"),
    "moonshine": "5.2",
    "afmoe": "5.5",
    "videomae": "5.6",
    "gpt_oss": "5.7",
    **dict.fromkeys(("audio-spectrogram-transformer", "beit", "deit", "ijepa", "pixio", "segformer", "swin"), "5.9"),
    **dict.fromkeys(("vit", "vit_mae", "vit_msn", "vivit"), "5.9"),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "recurrent_gemma"), "5.14"),
    **dict.fromkeys(("nemotron_h", "olmo_hybrid"), "5.15"),
    **dict.fromkeys(("aria_text", "dinov2", "dinov2_with_registers", "sew-d"), "5.18"),
    "fsmt": "5.18",  # before, its decoder sees the first token only
    "layoutlmv3": "5.24",
}


def is_too_old(release: str, model_type: str) -> bool:
    """Whether a release of transformers is older than the family of a model type needs.

    A development version counts as the release that it precedes.
    """
    return Version(release).release < Version(SINCE.get(model_type, "0")).release


def check_release(model_type: str) -> None:
    """Check that the installed transformers is new enough for the family of a model type.

    Raises:
        ValueError: It is older; the message names both releases.
    """
    from transformers import __version__  # not at the top, where it would load transformers with every import

    if is_too_old(__version__, model_type):
        needed = SINCE[model_type]
        raise ValueError(
            f"model type {model_type!r} needs transformers >= {needed}, and this is transformers {__version__}, whose "
            f"modules have other names or shapes: pip install --upgrade 'transformers>={needed}'"
        )


# model type → the projector's path and its layers, or None if it is not an FFN
LLAVA = ("multi_modal_projector", ("linear_1", "linear_2"))
PROJECTORS: dict[str, tuple[str, tuple[str, ...]] | None] = {
    "aria": ("multi_modal_projector.feed_forward", ("linear_in", "linear_out")),
    "audioflamingo3": LLAVA,
    "aya_vision": LLAVA,
    "blip-2": None,
    "cohere2_vision": LLAVA,
    "exaone4_5": None,
    "gemma3": None,
    "gemma4": None,
    "gemma4_unified": None,
    "glm46v": None,
    "glm4v": None,
    "glm4v_moe": None,
    "glm_ocr": None,
    "glmga": None,
    "got_ocr2": None,
    "hyperclovax_vision_v2": None,
    "idefics2": ("connector.modality_projection", named.GATED),
    "idefics3": None,
    "instructblip": None,
    "internvl": LLAVA,
    "janus": ("aligner", ("fc1", "hidden_layers.0")),
    "kimi_k25": ("mm_projector", ("in_proj", "out_proj")),
    "lfm2_vl": LLAVA,
    "lighton_ocr": ("vision_projection", ("linear_1", "linear_2")),
    "llama4": None,
    "llava": LLAVA,
    "llava_next": LLAVA,
    "llava_next_video": LLAVA,
    "llava_onevision": LLAVA,
    "mistral3": LLAVA,
    "mllama": None,
    "ovis2": None,
    "paddleocr_vl": ("projector", ("linear_1", "linear_2")),
    "paligemma": None,
    "pp_chart2table": None,
    "qianfan_ocr": LLAVA,
    "qwen2_5_omni_thinker": None,
    "qwen2_5_vl": None,
    "qwen2_audio": None,
    "qwen2_vl": None,
    "qwen3_5": None,
    "qwen3_5_moe": None,
    "qwen3_vl": None,
    "qwen3_vl_moe": None,
    "shieldgemma2": None,
    "smolvlm": None,
    "video_llama_3": LLAVA,
    "vipllava": LLAVA,
    "voxtral": LLAVA,
}
HALVED = ("aya_vision", "cohere2_vision")  # the projector's first layer has value and gate in one weight
MODEL_TYPES = tuple(PROJECTORS)


def couplings(model: nn.Module) -> list[Coupling]:
    found, layer = [], 0
    for path, part in _parts(model):
        kind = part_type(model.config, part.config)
        check_release(kind)
        own = named.couplings(part, kind) if kind in named.BY_TYPE else FAMILIES[kind](part)
        used = [coupling for coupling in own if coupling.layer < _layers_used(model, part)]
        found += [_under(path, layer, coupling) for coupling in used]
        layer += 1 + max((coupling.layer for coupling in used), default=-1)
    return found + _projector(model, layer)


def undeclared_parts(model: nn.Module) -> list[str]:
    """The model types without a declaration among the parts of a model that this file declares."""
    if getattr(getattr(model, "config", None), "model_type", None) not in PROJECTORS:
        return []
    kinds = [part_type(model.config, part.config) for _, part in _parts(model)]
    return [kind for kind in kinds if kind not in FAMILIES]


def part_type(whole: Any, part: Any) -> str:
    """The model type in the config of a part.

    In older releases of transformers the configs of some vision towers have no model type, or that of the whole.
    """
    return f"{whole.model_type}_vision" if part.model_type in ("", whole.model_type) else part.model_type


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over path and module of the models in a model, the language model first."""
    from transformers import PreTrainedModel

    parts = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in parts)
        own = isinstance(module, PreTrainedModel) and type(module.config) is not type(model.config)
        if own and not inside and any(isinstance(child, nn.Linear) for child in module.modules()):
            parts.append((path, module))
    language = model.config.get_text_config(decoder=True).model_type
    return iter(sorted(parts, key=lambda part: part[1].config.model_type != language))


def _layers_used(model: nn.Module, part: nn.Module) -> int | float:
    """The number of layers of a part whose outputs the model uses."""
    older = getattr(model.config, "vision_feature_layers", None)  # VipLLaVA's name in older releases
    chosen = getattr(model.config, "vision_feature_layer", older)
    vision = getattr(model.config, "vision_config", None)
    if chosen is None or vision is None or part.config.model_type != vision.model_type:
        return float("inf")
    depth = vision.num_hidden_layers
    return max(
        layer if layer >= 0 else depth + 1 + layer for layer in ([chosen] if isinstance(chosen, int) else chosen)
    )


def _projector(model: nn.Module, layer: int) -> list[Coupling]:
    row = PROJECTORS[model.config.model_type]
    if row is None:
        return []
    path, names = row
    build = _halved if model.config.model_type in HALVED else named.ffn_of
    return [build(model, layer, projector, names, kind="projector") for projector in named.modules_of(model, path)]


def _halved(model: nn.Module, layer: int, path: str, names: tuple[str, str], kind: str) -> Coupling:
    """A gated FFN whose first layer computes the values, then the gate."""
    up, down = (f"{path}.{name}" for name in names)
    channels = model.get_submodule(down).in_features
    return Coupling(kind, layer, in_one_weight(up, "ug", channels), Projection("d", down, channels, 1, 1))


def _under(path: str, first: int, coupling: Coupling) -> Coupling:
    """The coupling of a part as one of the whole model."""

    def moved(one):
        return replace(one, path=f"{path}.{one.path}")

    return replace(
        coupling,
        layer=first + coupling.layer,
        producers=tuple(map(moved, coupling.producers)),
        consumer=coupling.consumer and moved(coupling.consumer),
        vectors=tuple(map(moved, coupling.vectors)),
        block=coupling.block and f"{path}.{coupling.block}",
    )


FAMILIES.update(dict.fromkeys(MODEL_TYPES, couplings))
