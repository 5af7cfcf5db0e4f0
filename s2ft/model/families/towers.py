"""Vision towers, audio encoders and resamplers of multimodal models, as rows of one table.

A row names the lists of blocks, the layers of their attention and FFN, and the FFNs outside the lists (mergers). Numbers
of heads and channels are those of the weights.

Heads can move: positions are added to the embeddings, rotate all heads alike, or are a table of relative positions that
all heads share (GOT-OCR 2). Only the norms of InternVL's queries and keys are over all heads, and move with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from s2ft.model.builders import layers_of
from s2ft.model.coupling import Coupling

SEPARATE = ("q_proj", "k_proj", "v_proj", "out_proj")
GATED = ("up_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class Stack:
    """The names in a list of blocks.

    Attributes:
        blocks: Path of the list in the tower.
        attention: Path of the attention in a block.
        layers: Its layers: q, k, v, o or qkv, o.
        ffn: Path of the FFN in a block.
        channels: Its layers: up, down or up, gate, down.
        norms: Norms over all heads of q or k in the attention, where there are any.
    """

    blocks: str = "encoder.layers"
    attention: str = "self_attn"
    layers: tuple[str, ...] = SEPARATE
    ffn: str = "mlp"
    channels: tuple[str, ...] = ("fc1", "fc2")
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tower:
    """A tower: its lists of blocks, and its FFNs outside of them as (path, layers).

    A path that ends with ``.*`` is a list of modules.
    """

    stacks: tuple[Stack, ...]
    mergers: tuple[tuple[str, tuple[str, ...]], ...] = ()


CLIP = Tower((Stack(),))
QWEN2 = Stack("blocks", "attn", ("qkv", "proj"))
QWEN2_5 = Stack("blocks", "attn", ("qkv", "proj"), channels=GATED)
QWEN3 = Stack("blocks", "attn", ("qkv", "proj"), channels=("linear_fc1", "linear_fc2"))
QWEN2_MERGER = (("merger", ("mlp.0", "mlp.2")),)
QWEN3_MERGER = (("merger", ("linear_fc1", "linear_fc2")),)
DEEPSTACK = (("deepstack_merger_list.*", ("linear_fc1", "linear_fc2")),)
GLM_MERGER = (("merger", GATED),)
INTERNVL = ("q_proj", "k_proj", "v_proj", "projection_layer")
MLLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
WHISPER = Tower((Stack("layers", ffn=""),))
PACKED_CLIP = Tower((Stack(layers=("qkv", "projection")),))
SAM = Tower((Stack("layers", "attn", ("qkv", "proj"), channels=("lin1", "lin2")),))
MOONVIT = Tower((Stack("layers", "attn", ("q_proj", "k_proj", "v_proj", "proj")),))
GEMMA4 = tuple(f"{name}.linear" for name in MLLAMA)  # a module that clips inputs and outputs around each layer

TOWERS: dict[str, Tower] = {
    # vision
    "blip_2_vision_model": PACKED_CLIP,
    "cosmos3_edge_vision": CLIP,
    "exaone4_5_vision": Tower((QWEN2_5,), QWEN2_MERGER),
    "gemma4_vision": Tower(
        (Stack(layers=GEMMA4, channels=tuple(f"{name}.linear" for name in GATED)),),
    ),
    "glm4v_moe_vision": Tower((QWEN2_5,), GLM_MERGER),
    "glm4v_vision": Tower((QWEN2_5,), GLM_MERGER),
    "glm_ocr_vision": Tower((QWEN2_5,), GLM_MERGER),
    "got_ocr2_vision": SAM,
    "granite_docling_vision": CLIP,
    "idefics2_vision": CLIP,
    "idefics3_vision": CLIP,
    "instructblip_vision_model": PACKED_CLIP,
    "internvl_vision": Tower(
        (Stack("encoder.layer", "attention", INTERNVL, norms=("q_norm", "k_norm")),),
    ),
    "janus_vision_model": Tower((Stack(layers=INTERNVL),)),
    "kimi_k25_vision": MOONVIT,
    "llama4_vision_model": Tower(
        (Stack("model.layers", layers=MLLAMA),),
        (("vision_adapter.mlp", ("fc1", "fc2")),),
    ),
    "mllama_vision_model": Tower(
        (Stack("transformer.layers", layers=MLLAMA), Stack("global_transformer.layers", layers=MLLAMA)),
    ),
    "muse_glimmer_vision": MOONVIT,
    "ovis2_vision": Tower(
        (Stack("transformer.encoder.layers", "attention", ffn="ffn", channels=GATED),),
    ),
    "paddleocr_vl_vision": Tower((Stack("vision_model.encoder.layers"),)),
    "pixtral": Tower(
        (Stack("transformer.layers", "attention", MLLAMA, "feed_forward", GATED),),
    ),
    "qianfan_ocr_vision": Tower(
        (Stack("layers", "attention", INTERNVL, norms=("q_norm", "k_norm")),),
    ),
    "qwen2_5_omni_vision_encoder": Tower(
        (Stack("blocks", "attn", ("q", "k", "v", "proj"), channels=GATED),), QWEN2_MERGER
    ),
    "qwen2_5_vl_vision": Tower((QWEN2_5,), QWEN2_MERGER),
    "qwen2_vl_vision": Tower((QWEN2,), QWEN2_MERGER),
    "qwen3_5_moe_vision": Tower((QWEN3,), QWEN3_MERGER),
    "qwen3_5_vision": Tower((QWEN3,), QWEN3_MERGER),
    "qwen3_vl_moe_vision": Tower((QWEN3,), QWEN3_MERGER + DEEPSTACK),
    "qwen3_vl_vision": Tower((QWEN3,), QWEN3_MERGER + DEEPSTACK),
    "siglip2_vision_model": CLIP,
    "siglip_vision_model": CLIP,
    "smolvlm_vision": CLIP,
    "video_llama_3_vision": CLIP,
    # audio
    "audioflamingo3_encoder": WHISPER,
    "qwen2_5_omni_audio_encoder": WHISPER,
    "qwen2_audio_encoder": WHISPER,
    "voxtral_encoder": WHISPER,
    # between a tower and the language model
    "idefics2_perceiver": Tower((Stack("layers", layers=MLLAMA, channels=GATED),)),
}
MODEL_TYPES = tuple(TOWERS)


def couplings(model: nn.Module) -> list[Coupling]:
    tower = TOWERS[model.config.model_type]
    heads = _heads(model.config)
    found, layer = [], 0
    for stack in tower.stacks:
        for layer, (path, block) in enumerate(layers_of(model, stack.blocks), layer):
            found.append(feed_forward(model, layer, f"{path}.{stack.ffn}".rstrip("."), stack.channels))
            found.append(_attention(model, layer, f"{path}.{stack.attention}", stack, heads))
        layer += 1
    for path, names in tower.mergers:
        for merger in modules_of(model, path):
            if merger in _unused(model.config):
                continue
            found.append(feed_forward(model, layer, merger, names))
            layer += 1
    return found


def feed_forward(model: nn.Module, layer: int, path: str, names: tuple[str, ...], kind: str = "ffn") -> Coupling:
    """The FFN of a module whose layers have `names`: up, down or up, gate, down."""
    paths = [f"{path}.{name}" for name in names]
    channels = model.get_submodule(paths[-1]).in_features
    if len(paths) == 2:
        return Coupling.ffn(layer, up=paths[0], down=paths[1], channels=channels, kind=kind)
    return Coupling.gated_ffn(layer, up=paths[0], gate=paths[1], down=paths[2], channels=channels, kind=kind)


def modules_of(model: nn.Module, path: str) -> Iterator[str]:
    """Iterate over the path, if the model has that module; of a path ``list.*`` over the modules of the list."""
    try:
        module = model.get_submodule(path.removesuffix(".*"))
    except AttributeError:
        return
    if path.endswith(".*"):
        yield from (f"{path[:-2]}.{i}" for i in range(len(module)))
    else:
        yield path


def _attention(model: nn.Module, layer: int, path: str, stack: Stack, heads: int) -> Coupling:
    paths = [f"{path}.{name}" for name in stack.layers]
    head_dim = model.get_submodule(paths[-1]).in_features // heads
    outputs = model.get_submodule(paths[-2]).out_features // head_dim
    sizes = {"heads": heads, "head_dim": head_dim}
    if len(paths) == 2:  # one weight with the queries and twice the key/value heads
        return Coupling.packed_attention(layer, qkv=paths[0], o=paths[1], **sizes, kv_heads=(outputs - heads) // 2)
    names = (f"{path}.{norm}.weight" for norm in stack.norms)
    moving = {name: head_dim for name in names if hasattr(model.get_submodule(name.rpartition(".")[0]), "weight")}
    q, k, v, o = paths
    return Coupling.attention(layer, q=q, k=k, v=v, o=o, **sizes, kv_heads=outputs, moving=moving)


def _unused(config) -> set[str]:
    """The mergers of layers that the tower does not have."""
    layers = getattr(config, "deepstack_visual_indexes", None) or []
    return {f"deepstack_merger_list.{i}" for i, layer in enumerate(layers) if layer >= config.depth}


def _heads(config) -> int:
    names = ("num_attention_heads", "num_heads", "encoder_attention_heads", "resampler_n_heads")
    return next(value for name in names if (value := getattr(config, name, None)))
