"""Vision towers, audio encoders and resamplers of multimodal models: rows of names, and the FFNs outside the blocks.

Heads can move: positions are added to the embeddings, rotate all heads alike, or are a table of relative positions that
all heads share (GOT-OCR 2). Only the norms of InternVL's queries and keys are over all heads, and move with them.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from s2ft.model.builders import ffn, under_base
from s2ft.model.coupling import Coupling
from s2ft.model.families.named import CLIP_LIKE, QKVO, Names, named

PROJECTED = ("q_proj", "k_proj", "v_proj", "projection_layer")
QKV = ("qkv", "proj")
QWEN2 = Names(("blocks",), "mlp.fc1", "mlp.fc2", attention="attn", layers=QKV)
QWEN2_5 = replace(QWEN2, up="mlp.up_proj", down="mlp.down_proj", gate="mlp.gate_proj")
QWEN3 = replace(QWEN2, up="mlp.linear_fc1", down="mlp.linear_fc2")
LLAMA4 = replace(CLIP_LIKE, stacks=("model.layers",), layers=QKVO)
PIXTRAL = Names(
    ("transformer.layers",),
    "feed_forward.up_proj",
    "feed_forward.down_proj",
    gate="feed_forward.gate_proj",
    attention="attention",
    layers=QKVO,
)
MOONVIT = Names(("layers",), "mlp.fc1", "mlp.fc2", attention="attn", layers=("q_proj", "k_proj", "v_proj", "proj"))
INTERNVL = Names(
    ("encoder.layer",),
    "mlp.fc1",
    "mlp.fc2",
    attention="attention",
    layers=PROJECTED,
    moves=("q_norm.weight", "k_norm.weight"),
)
GEMMA4 = Names(  # a module that clips inputs and outputs is around each layer
    ("encoder.layers",),
    "mlp.up_proj.linear",
    "mlp.down_proj.linear",
    gate="mlp.gate_proj.linear",
    layers=tuple(f"{name}.linear" for name in QKVO),
)
OVIS2 = Names(
    ("transformer.encoder.layers",), "ffn.up_proj", "ffn.down_proj", gate="ffn.gate_proj", attention="attention"
)

QFORMER = Names(  # its FFN for the queries; the one for text gets no gradient in the last layer
    ("encoder.layer",),
    "intermediate_query.dense",
    "output_query.dense",
    attention="attention",
    layers=("attention.query", "attention.key", "attention.value", "output.dense"),
    cross="crossattention",
)

NAMES: dict[tuple[str, ...], Names] = {
    # vision
    ("blip_2_vision_model", "instructblip_vision_model"): replace(CLIP_LIKE, layers=("qkv", "projection")),
    (
        "idefics2_vision",
        "idefics3_vision",
        "siglip2_vision_model",
        "siglip_vision_model",
        "smolvlm_vision",
        "video_llama_3_vision",
    ): CLIP_LIKE,
    ("exaone4_5_vision", "glm4v_moe_vision", "glm4v_vision", "glm_ocr_vision", "qwen2_5_vl_vision"): QWEN2_5,
    ("gemma4_vision",): GEMMA4,
    ("got_ocr2_vision", "pp_chart2table_vision"): Names(
        ("layers",), "mlp.lin1", "mlp.lin2", attention="attn", layers=QKV
    ),
    ("internvl_vision",): INTERNVL,
    ("janus_vision_model",): replace(CLIP_LIKE, layers=PROJECTED),
    ("kimi_k25_vision",): MOONVIT,
    ("llama4_vision_model",): LLAMA4,
    ("mllama_vision_model",): replace(LLAMA4, stacks=("transformer.layers", "global_transformer.layers")),
    ("ovis2_vision",): OVIS2,
    ("paddleocr_vl_vision",): replace(CLIP_LIKE, stacks=("vision_model.encoder.layers",)),
    ("pixtral",): PIXTRAL,
    ("qianfan_ocr_vision",): replace(INTERNVL, stacks=("layers",)),
    ("qwen2_5_omni_vision_encoder",): replace(QWEN2_5, layers=("q", "k", "v", "proj")),
    ("qwen2_vl_vision",): QWEN2,
    ("qwen3_5_moe_vision", "qwen3_5_vision", "qwen3_vl_moe_vision", "qwen3_vl_vision"): QWEN3,
    # audio
    ("audioflamingo3_encoder", "qwen2_5_omni_audio_encoder", "qwen2_audio_encoder", "voxtral_encoder"): Names(
        ("layers",), "fc1", "fc2"
    ),
    # between a tower and the language model
    ("blip_2_qformer", "instructblip_qformer"): QFORMER,
    ("idefics2_perceiver",): Names(("layers",), "mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj", layers=QKVO),
}
BY_TYPE = {model_type: names for model_types, names in NAMES.items() for model_type in model_types}
MODEL_TYPES = tuple(BY_TYPE)

# model type → path and layers (up, down, gate) of the FFNs outside the blocks; * stands for every module of a list
GATED = ("up_proj", "down_proj", "gate_proj")
MLP = ("merger", ("mlp.0", "mlp.2"))
LINEAR_FC = ("linear_fc1", "linear_fc2")
MERGERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    **dict.fromkeys(
        ("exaone4_5_vision", "qwen2_5_omni_vision_encoder", "qwen2_5_vl_vision", "qwen2_vl_vision"), (MLP,)
    ),
    **dict.fromkeys(("glm4v_moe_vision", "glm4v_vision", "glm_ocr_vision"), (("merger", GATED),)),
    **dict.fromkeys(("qwen3_5_moe_vision", "qwen3_5_vision"), (("merger", LINEAR_FC),)),
    **dict.fromkeys(
        ("qwen3_vl_moe_vision", "qwen3_vl_vision"), (("merger", LINEAR_FC), ("deepstack_merger_list.*", LINEAR_FC))
    ),
    "llama4_vision_model": (("vision_adapter.mlp", ("fc1", "fc2")),),
}


def couplings(model: nn.Module, model_type: str | None = None) -> list[Coupling]:
    model_type = model_type or model.config.model_type
    found = named(model, (BY_TYPE[model_type],))
    first = 1 + max((coupling.layer for coupling in found), default=-1)
    mergers = [
        (merger, names)
        for path, names in MERGERS.get(model_type, ())
        for merger in modules_of(model, path)
        if merger not in _unused(model.config)
    ]
    return found + [ffn_of(model, layer, merger, names) for layer, (merger, names) in enumerate(mergers, first)]


def ffn_of(model: nn.Module, layer: int, path: str, names: tuple[str, ...], kind: str = "ffn") -> Coupling:
    """The FFN of a module whose layers have `names`: up, down and perhaps gate."""
    return ffn(model, layer, *(f"{path}.{name}" for name in names), kind=kind)


def modules_of(model: nn.Module, path: str) -> Iterator[str]:
    """Iterate over the path in the base model, if it has that module; of ``list.*`` over the modules of the list."""
    found = under_base(model, path.removesuffix(".*"))
    try:
        module = model.get_submodule(found)
    except AttributeError:
        return
    yield from (f"{found}.{i}" for i in range(len(module))) if path.endswith(".*") else (found,)


def _unused(config) -> set[str]:
    """The mergers of layers that the tower does not have."""
    layers = getattr(config, "deepstack_visual_indexes", None) or []
    return {f"deepstack_merger_list.{i}" for i, layer in enumerate(layers) if layer >= config.depth}
