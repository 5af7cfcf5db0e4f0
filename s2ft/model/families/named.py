"""Families that differ in the names of their layers only: an attention and an FFN.

Most are encoders of text, sound and images, also inside multimodal models, translators, and decoders without a gate.
`NAMES` has a row for each way of naming. Sizes are those of the layers. An FFN may be packed, with gate and up in one
layer. Layers are counted through the stacks in their order, so first those of an encoder.

Layer scales, norms over the width and tables of positions that are added to the embeddings concern no unit. Position
biases of single heads (BEiT, MPNet, Swin, self-attention of T5) and slopes of heads (BLOOM, MPT) do: heads with them
stay. So do those of Funnel, whose parameters have the heads in their second dimension, and the channels of ConvNeXt V2
with its norm of responses. FNet has no attention, and XLNet's has no layers. WavLM multiplies by the weights of its
attention without its layers, so a slice in a layer would change nothing: only its FFNs are trained. So does SigLIP's
pooling head, which is left out.

Heads of the towers of multimodal models can move: positions are added to the embeddings, rotate all heads alike, or are
a table of relative positions that all heads share (GOT-OCR 2). Only the norms of InternVL's queries and keys are over
all heads, and move with them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from s2ft.model.coupling import Coupling, Projection, Vector, in_one_weight
from s2ft.model.families.decoders import (
    attention,
    config_of,
    ffn,
    heads_in,
    layers_of,
    outputs_of,
    packed_attention,
    under_base,
)
from s2ft.model.weights import get

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
SELF_AND_OUTPUT = ("attention.query", "attention.key", "attention.value", "output.dense")
BERT = ("self.query", "self.key", "self.value", "output.dense")
GATED = ("up_proj", "down_proj", "gate_proj")
GATED_MLP = ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
POSITION_BIAS = ("use_relative_position_bias", "use_shared_relative_position_bias")


@dataclass(frozen=True)
class Names:
    """The names of a family's layers.

    Attributes:
        stacks: Lists of blocks in the base model; * stands for every module of a list.
        up: Path of the FFN's first layer in its block.
        down: Path of the FFN's last layer.
        gate: Path of the FFN's gate, if it is a layer of its own.
        attention: Path of the attention, or paths of which a block has one; None if no layer of it can be trained.
        layers: Paths of q, k, v and o in the attention; or of q, k and v in one layer, and of o.
        interleaved: Whether one layer with q, k and v has those of each head in turn. It has all of q first where heads
            share keys, as in GPT-BigCode with multi_query.
        cross: Path of the attention to the encoder, in blocks that have one. Its layers have the same names.
        more: Other layers of the attention that are split by its heads, with their keys; a type may lack them.
        channel_moves: Tensors of the block whose first dimension has an entry for each channel of the FFN.
        moves: Tensors of the attention whose first dimension is split by the heads; a type may lack them.
        channels_stay: Whether the FFN's channels can't move.
        numbered: Whether something outside numbers the heads, so that they stay; or flags of the config, each of which
            tells it.
        cross_numbered: The same for the attention to the encoder.
        gated: Paths of up, down and gate in blocks that have such a gate, in place of the FFN's layers above.
    """

    stacks: tuple[str, ...]
    up: str
    down: str
    gate: str | None = None
    attention: str | tuple[str, ...] | None = "self_attn"
    layers: tuple[str, ...] = QKV_OUT
    interleaved: bool = False
    cross: str | None = None
    more: tuple[tuple[str, str], ...] = ()
    channel_moves: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    channels_stay: bool = False
    numbered: bool | tuple[str, ...] = False
    cross_numbered: bool = False
    gated: tuple[str, str, str] | None = None


ENCODER_DECODER = Names(("encoder.layers", "decoder.layers"), "fc1", "fc2", cross="encoder_attn")
BART_DECODER = Names(("decoder.layers",), "fc1", "fc2", cross="encoder_attn")
PROPHETNET = ("query_proj", "key_proj", "value_proj", "out_proj")
PROPHETNET_FFN = ("feed_forward.intermediate", "feed_forward.output")
BERT_LIKE = Names(
    ("encoder.layer",), "intermediate.dense", "output.dense", attention="attention", layers=BERT, cross="crossattention"
)
DEBERTA = replace(
    BERT_LIKE,
    layers=("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    more=(("self.pos_key_proj", "k"), ("self.pos_query_proj", "q")),
)
CLIP_LIKE = Names(("encoder.layers",), "mlp.fc1", "mlp.fc2")
VIT_LIKE = Names(("layers",), "mlp.fc1", "mlp.fc2", attention="attention", layers=QKVO)
WAV2VEC2 = Names(
    ("encoder.layers",), "feed_forward.intermediate_dense", "feed_forward.output_dense", attention="attention"
)
DECODER = Names(("layers",), "fc1", "fc2")
PLAIN_MLP = Names(("layers",), "mlp.up_proj", "mlp.down_proj", layers=QKVO)
GPT2 = Names(("h",), "mlp.c_fc", "mlp.c_proj", attention="attn", layers=("c_attn", "c_proj"))
NEOX = Names(
    ("layers",),
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
    attention="attention",
    layers=("query_key_value", "dense"),
    interleaved=True,
)

PROJECTED = ("q_proj", "k_proj", "v_proj", "projection_layer")
QKV = ("qkv", "proj")
QWEN2 = Names(("blocks",), "mlp.fc1", "mlp.fc2", attention="attn", layers=QKV)
QWEN2_5 = replace(QWEN2, up="mlp.up_proj", down="mlp.down_proj", gate="mlp.gate_proj")
LLAMA4 = replace(CLIP_LIKE, stacks=("model.layers",), layers=QKVO)
INTERNVL = Names(
    ("encoder.layer",),
    "mlp.fc1",
    "mlp.fc2",
    attention="attention",
    layers=PROJECTED,
    moves=("q_norm.weight", "k_norm.weight"),
)

T5 = Names(
    ("encoder.block",),
    "layer.1.DenseReluDense.wi",
    "layer.1.DenseReluDense.wo",
    attention=tuple(
        f"layer.0.{name}" for name in ("SelfAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")
    ),
    layers=("q", "k", "v", "o"),
    numbered=True,
    gated=("layer.1.DenseReluDense.wi_1", "layer.1.DenseReluDense.wo", "layer.1.DenseReluDense.wi_0"),
)
NAMES: dict[tuple[str, ...], Names] = {
    ("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "trocr"): ENCODER_DECODER,
    ("seamless_m4t", "seamless_m4t_v2"): replace(
        ENCODER_DECODER,
        stacks=("text_encoder.layers", "text_decoder.layers"),
        up="ffn.fc1",
        down="ffn.fc2",
        cross="cross_attention",
    ),
    ("fsmt", "m2m_100", "pegasus_x", "speech_to_text"): ENCODER_DECODER,
    ("whisper",): replace(ENCODER_DECODER, cross_numbered=True),  # alignment_heads of its generation config
    ("moonshine",): replace(ENCODER_DECODER, up="mlp.fc1", down="mlp.fc2", layers=QKVO),
    ("biogpt", "xglm"): DECODER,
    ("opt",): replace(DECODER, stacks=("decoder.layers",)),
    (
        *("bert", "bert-generation", "bros", "camembert", "data2vec-text", "electra", "ernie", "esm"),
        *("layoutlm", "markuplm", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
        *("roformer", "splinter", "tapas", "visual_bert", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso"),
    ): BERT_LIKE,
    ("clip", "metaclip_2", "siglip"): replace(
        CLIP_LIKE, stacks=("text_model.encoder.layers", "vision_model.encoder.layers")
    ),
    ("clip_text_model", "clip_vision_model", "tipsv2_text_model"): CLIP_LIKE,
    ("deberta-v2",): DEBERTA,
    ("big_bird",): replace(BERT_LIKE, numbered=True),  # each head draws its blocks
    ("layoutlmv3",): replace(BERT_LIKE, numbered=("has_relative_attention_bias",)),
    ("longformer",): replace(
        BERT_LIKE, more=(("self.query_global", "q"), ("self.key_global", "k"), ("self.value_global", "v"))
    ),
    ("luke",): replace(BERT_LIKE, more=(("self.w2e_query", "q"), ("self.e2w_query", "q"), ("self.e2e_query", "q"))),
    ("deberta",): replace(
        BERT_LIKE,
        layers=("self.in_proj", "output.dense"),
        interleaved=True,
        more=(("self.pos_proj", "k"), ("self.pos_q_proj", "q")),
        moves=("self.q_bias", "self.v_bias"),
    ),
    ("fnet",): replace(BERT_LIKE, attention=None),
    ("funnel",): Names(
        ("encoder.blocks.*", "decoder.layers"),
        "ffn.linear_1",
        "ffn.linear_2",
        attention="attention",
        layers=("q_head", "k_head", "v_head", "post_proj"),
        numbered=True,
    ),
    ("xlnet",): Names(("layer",), "ff.layer_1", "ff.layer_2", attention=None),
    ("t5gemma",): Names(
        ("encoder.layers", "decoder.layers"),
        "mlp.up_proj",
        "mlp.down_proj",
        gate="mlp.gate_proj",
        layers=QKVO,
        cross="cross_attn",
    ),
    ("nystromformer",): replace(BERT_LIKE, moves=("self.conv.weight",)),
    ("mpnet",): replace(BERT_LIKE, layers=("attn.q", "attn.k", "attn.v", "attn.o"), numbered=True),
    ("distilbert",): Names(
        ("transformer.layer",),
        "ffn.lin1",
        "ffn.lin2",
        attention="attention",
        layers=("q_lin", "k_lin", "v_lin", "out_lin"),
    ),
    ("jina_embeddings_v3",): Names(("layers",), "mlp.fc1", "mlp.fc2", layers=QKVO),
    ("ctrl",): Names(("h",), "ffn.0", "ffn.2", attention="multi_head_attention", layers=("Wq", "Wk", "Wv", "dense")),
    ("gpt_neo",): Names(("h",), "mlp.c_fc", "mlp.c_proj", attention="attn.attention"),
    ("gpt2", "imagegpt", "openai-gpt"): replace(GPT2, cross="crossattention"),
    ("gpt_bigcode",): replace(GPT2, interleaved=True),
    ("gptj",): Names(("h",), "mlp.fc_in", "mlp.fc_out", attention="attn"),
    ("starcoder2",): Names(("layers",), "mlp.c_fc", "mlp.c_proj", layers=QKVO),
    ("phi",): Names(("layers",), "mlp.fc1", "mlp.fc2", layers=("q_proj", "k_proj", "v_proj", "dense")),
    ("phi3",): Names(("layers",), "mlp.gate_up_proj", "mlp.down_proj", layers=("qkv_proj", "o_proj")),
    ("apertus", "apertus1p5_text", "arcee", "jais2", "nemotron"): PLAIN_MLP,
    ("nanochat",): replace(PLAIN_MLP, up="mlp.fc1", down="mlp.fc2"),
    ("glm", "glm4", "glm4v_text", "glm_ocr_text"): replace(PLAIN_MLP, up="mlp.gate_up_proj"),
    ("modernbert",): Names(("layers",), "mlp.Wi", "mlp.Wo", attention="attn", layers=("Wqkv", "Wo")),
    ("modernbert-decoder",): Names(
        ("layers",), "mlp.Wi", "mlp.Wo", attention="attn", layers=("q_proj", "k_proj", "v_proj", "Wo")
    ),
    ("bloom",): replace(NEOX, stacks=("h",), attention="self_attention", numbered=True),
    ("gpt_neox", "gpt_neox_japanese"): NEOX,
    ("persimmon",): replace(NEOX, attention="self_attn"),
    ("mpt",): Names(
        ("blocks",), "ffn.up_proj", "ffn.down_proj", attention="attn", layers=("Wqkv", "out_proj"), numbered=True
    ),
    ("albert",): Names(
        ("encoder.albert_layer_groups.*.albert_layers",),
        "ffn",
        "ffn_output",
        attention="attention",
        layers=("query", "key", "value", "dense"),
    ),
    ("bitnet",): replace(
        PLAIN_MLP, gate="mlp.gate_proj", channel_moves=("mlp.ffn_sub_norm.weight",), moves=("attn_sub_norm.weight",)
    ),
    ("audio-spectrogram-transformer", "deit", "ijepa", "pixio", "vit", "vit_mae", "vit_msn", "vivit"): VIT_LIKE,
    ("beit",): replace(VIT_LIKE, numbered=POSITION_BIAS),
    ("dinov2", "dinov2_with_registers"): replace(VIT_LIKE, stacks=("encoder.layer",), gated=GATED_MLP),
    ("dinov3_vit",): replace(VIT_LIKE, stacks=("layer",), up="mlp.up_proj", down="mlp.down_proj", gated=GATED_MLP),
    ("convnext",): Names(("encoder.stages.*.layers",), "pwconv1", "pwconv2", attention=None),
    ("convnextv2",): Names(("encoder.stages.*.layers",), "pwconv1", "pwconv2", attention=None, channels_stay=True),
    ("swin",): replace(VIT_LIKE, stacks=("encoder.layers.*.blocks",), numbered=True),
    ("donut-swin", "swinv2"): replace(BERT_LIKE, stacks=("encoder.layers.*.blocks",), numbered=True),
    ("focalnet",): Names(("encoder.stages.*.layers",), "mlp.fc1", "mlp.fc2", attention=None),
    ("pvt",): Names(("encoder.block.*",), "mlp.dense1", "mlp.dense2", attention="attention", layers=BERT),
    ("pvt_v2",): Names(
        ("encoder.layers.*.blocks",),
        "mlp.dense1",
        "mlp.dense2",
        attention="attention",
        layers=("query", "key", "value", "proj"),
        channel_moves=("mlp.dwconv.dwconv.weight", "mlp.dwconv.dwconv.bias"),
    ),
    ("hiera",): Names(("encoder.stages.*.layers",), "mlp.fc1", "mlp.fc2", attention="attn", layers=("qkv", "proj")),
    ("segformer",): replace(
        VIT_LIKE, stacks=("stages.*.blocks",), channel_moves=("mlp.dwconv.dwconv.weight", "mlp.dwconv.dwconv.bias")
    ),
    ("videomae", "yolos"): replace(BERT_LIKE, layers=SELF_AND_OUTPUT),
    ("data2vec-vision",): replace(BERT_LIKE, layers=SELF_AND_OUTPUT, numbered=POSITION_BIAS),
    ("data2vec-audio", "hubert", "sew", "unispeech", "unispeech-sat", "wav2vec2"): WAV2VEC2,
    ("wavlm",): replace(WAV2VEC2, attention=None),
    ("sew-d",): replace(DEBERTA, stacks=("encoder.encoder.layer",)),
    # vision towers of models of images and text
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
    ("gemma4_vision",): Names(  # a module that clips inputs and outputs is around each layer
        ("encoder.layers",),
        "mlp.up_proj.linear",
        "mlp.down_proj.linear",
        gate="mlp.gate_proj.linear",
        layers=tuple(f"{name}.linear" for name in QKVO),
    ),
    ("got_ocr2_vision", "pp_chart2table_vision"): Names(
        ("layers",), "mlp.lin1", "mlp.lin2", attention="attn", layers=QKV
    ),
    ("internvl_vision",): INTERNVL,
    ("janus_vision_model",): replace(CLIP_LIKE, layers=PROJECTED),
    ("kimi_k25_vision",): Names(
        ("layers",), "mlp.fc1", "mlp.fc2", attention="attn", layers=("q_proj", "k_proj", "v_proj", "proj")
    ),
    ("llama4_vision_model",): LLAMA4,
    ("mllama_vision_model",): replace(LLAMA4, stacks=("transformer.layers", "global_transformer.layers")),
    ("ovis2_vision",): Names(
        ("transformer.encoder.layers",), "ffn.up_proj", "ffn.down_proj", gate="ffn.gate_proj", attention="attention"
    ),
    ("paddleocr_vl_vision",): replace(CLIP_LIKE, stacks=("vision_model.encoder.layers",)),
    ("pixtral",): Names(
        ("transformer.layers",),
        "feed_forward.up_proj",
        "feed_forward.down_proj",
        gate="feed_forward.gate_proj",
        attention="attention",
        layers=QKVO,
    ),
    ("qianfan_ocr_vision",): replace(INTERNVL, stacks=("layers",)),
    ("qwen2_5_omni_vision_encoder",): replace(QWEN2_5, layers=("q", "k", "v", "proj")),
    ("qwen2_vl_vision",): QWEN2,
    ("qwen3_5_moe_vision", "qwen3_5_vision", "qwen3_vl_moe_vision", "qwen3_vl_vision"): replace(
        QWEN2, up="mlp.linear_fc1", down="mlp.linear_fc2"
    ),
    # audio encoders
    ("audioflamingo3_encoder", "qwen2_5_omni_audio_encoder", "qwen2_audio_encoder", "voxtral_encoder"): Names(
        ("layers",), "fc1", "fc2"
    ),
    # between a tower and the language model
    ("blip_2_qformer", "instructblip_qformer"): Names(  # the FFN for text gets no gradient in the last layer
        ("encoder.layer",),
        "intermediate_query.dense",
        "output_query.dense",
        attention="attention",
        layers=("attention.query", "attention.key", "attention.value", "output.dense"),
        cross="crossattention",
    ),
    ("idefics2_perceiver",): Names(("layers",), "mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj", layers=QKVO),
}
# Types with stacks of several structures
SEVERAL: dict[tuple[str, ...], tuple[Names, ...]] = {
    ("git",): (BERT_LIKE, replace(CLIP_LIKE, stacks=("image_encoder.vision_model.encoder.layers",))),
    ("bigbird_pegasus",): (
        Names(
            ("encoder.layers",), "fc1", "fc2", layers=("self.query", "self.key", "self.value", "output"), numbered=True
        ),
        BART_DECODER,
    ),
    ("led",): (
        Names(
            ("encoder.layers",),
            "fc1",
            "fc2",
            layers=tuple(f"longformer_self_attn.{name}" for name in ("query", "key", "value")) + ("output",),
            more=tuple((f"longformer_self_attn.{name}_global", name[0]) for name in ("query", "key", "value")),
        ),
        BART_DECODER,
    ),
    ("longt5", "mt5", "pop2piano", "t5", "umt5"): (
        T5,
        replace(
            T5,
            stacks=("decoder.block",),
            up="layer.2.DenseReluDense.wi",
            down="layer.2.DenseReluDense.wo",
            cross="layer.1.EncDecAttention",
            gated=("layer.2.DenseReluDense.wi_1", "layer.2.DenseReluDense.wo", "layer.2.DenseReluDense.wi_0"),
        ),
    ),
    ("mobilebert",): (BERT_LIKE, Names(("encoder.layer.*.ffn",), "intermediate.dense", "output.dense", attention=None)),
    ("prophetnet",): (
        Names(("encoder.layers",), *PROPHETNET_FFN, layers=PROPHETNET),
        Names(("decoder.layers",), *PROPHETNET_FFN, layers=PROPHETNET, cross="cross_attn", numbered=True),
    ),
    ("speecht5",): (
        replace(WAV2VEC2, stacks=("encoder.wrapped_encoder.layers",)),
        replace(WAV2VEC2, stacks=("decoder.wrapped_decoder.layers",), attention="self_attn", cross="encoder_attn"),
    ),
}
BY_TYPE = {model_type: (names,) for model_types, names in NAMES.items() for model_type in model_types} | {
    model_type: names for model_types, names in SEVERAL.items() for model_type in model_types
}
MODEL_TYPES = tuple(BY_TYPE)


# model type → path and layers (up, down, gate) of the FFNs outside the blocks; * stands for every module of a list
LINEAR_FC = ("linear_fc1", "linear_fc2")
MERGERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    **dict.fromkeys(
        ("exaone4_5_vision", "qwen2_5_omni_vision_encoder", "qwen2_5_vl_vision", "qwen2_vl_vision"),
        (("merger", ("mlp.0", "mlp.2")),),
    ),
    **dict.fromkeys(("glm4v_moe_vision", "glm4v_vision", "glm_ocr_vision"), (("merger", GATED),)),
    **dict.fromkeys(("qwen3_5_moe_vision", "qwen3_5_vision"), (("merger", LINEAR_FC),)),
    **dict.fromkeys(
        ("qwen3_vl_moe_vision", "qwen3_vl_vision"), (("merger", LINEAR_FC), ("deepstack_merger_list.*", LINEAR_FC))
    ),
    "llama4_vision_model": (("vision_adapter.mlp", ("fc1", "fc2")),),
}


def couplings(model: nn.Module, model_type: str | None = None) -> list[Coupling]:
    """List the couplings of a model by the rows of its type, one row after another, and its FFNs outside the blocks.

    Args:
        model: The model.
        model_type: The type. Default: that of the model's config.
    """
    known: str = model_type or config_of(model).model_type
    stacks = [(names, stack) for names in BY_TYPE[known] for stack in names.stacks]
    blocks = [(names, path, block) for names, stack in stacks for path, block in _blocks(model, stack)]
    found = [one for i, (names, path, block) in enumerate(blocks) for one in _block(model, names, i, path, block)]
    layers = getattr(config_of(model), "deepstack_visual_indexes", None) or []
    unused = {f"deepstack_merger_list.{i}" for i, layer in enumerate(layers) if layer >= config_of(model).depth}
    rows = [(one, names) for path, names in MERGERS.get(known, ()) for one in modules_of(model, path)]
    mergers = enumerate((row for row in rows if row[0] not in unused), len(blocks))
    return found + [ffn_of(model, layer, path, names) for layer, (path, names) in mergers]


def ffn_of(model: nn.Module, layer: int, path: str, names: tuple[str, ...], kind: str = "ffn") -> Coupling:
    """The FFN of a module whose layers have `names`: up, down and perhaps gate."""
    return ffn(model, layer, *(f"{path}.{name}" for name in names), kind=kind)


def modules_of(model: nn.Module, path: str) -> Iterator[str]:
    """Iterate over the path in the base model, if it has that module; of ``list.*`` over the modules of the list."""
    found = under_base(model, path.removesuffix(".*"))
    module = get(model, found)
    if module is not None:
        yield from (f"{found}.{i}" for i in range(len(module))) if path.endswith(".*") else (found,)


def _blocks(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (path, module) of the blocks of a stack."""
    outer, star, inner = stack.rpartition(".*")
    if not star:
        yield from layers_of(model, stack)
        return
    for path, module in _blocks(model, outer):
        blocks: Any = get(module, inner[1:]) if inner else module
        yield from ((f"{path}{inner}.{i}", block) for i, block in enumerate(blocks or ()))


def _block(model: nn.Module, names: Names, i: int, path: str, block: nn.Module) -> list[Coupling]:
    gated = names.gated if names.gated and get(block, names.gated[-1]) is not None else None
    layers = gated or (names.up, names.down, *filter(None, [names.gate]))
    vectors = tuple(Vector(f"{path}.{name}", 1) for name in names.channel_moves)
    found = [replace(ffn_of(model, i, path, layers), vectors=vectors, fixed=names.channels_stay)]
    cross = names.cross if _has_encoder(config_of(model)) else None
    own = names.attention if isinstance(names.attention, tuple) else (names.attention,)
    for name, kind in (*((one, "attention") for one in own), (cross, "cross-attention")):
        if name and get(block, name) is not None:
            flags = names.numbered if kind == "attention" else names.cross_numbered
            fixed = flags if isinstance(flags, bool) else any(getattr(config_of(model), flag) for flag in flags)
            found.append(_attention(model, names, i, f"{path}.{name}", fixed=fixed, kind=kind))
    return found


def _has_encoder(config: Any) -> bool:
    """Whether a decoder attends to an encoder. Alone, BART's decoder never runs the cross-attention that it has."""
    return (
        getattr(config, "is_encoder_decoder", False)
        or getattr(config, "add_cross_attention", False)
        or getattr(config, "cross_attention_hidden_size", None) is not None
        or config.model_type == "whisper"  # its decoder alone is given the encoder's outputs
    )


def _attention(model: nn.Module, names: Names, layer: int, path: str, **options) -> Coupling:
    block = model.get_submodule(path)
    heads = heads_in(model, path)
    more = {f"{path}.{name}": key for name, key in names.more if get(block, name) is not None}
    moving = {
        f"{path}.{name}": len(tensor) // heads for name in names.moves if (tensor := get(block, name)) is not None
    }
    if len(names.layers) == 2:
        qkv, o = (f"{path}.{name}" for name in names.layers)
        if get(block, "q_attn") is not None:
            # GPT-2's attention to an encoder has k and v in one weight, and q in another.
            q = f"{path}.q_attn"
            unit = outputs_of(model, q) // heads
            producers = (
                Projection("q", q, heads, unit, 0),
                *in_one_weight(qkv, [("k", heads, unit), ("v", heads, unit)]),
            )
            return Coupling(layer=layer, producers=producers, consumer=Projection("o", o, heads, unit, 1), **options)
        packed = packed_attention(model, layer, qkv, o, heads, names.interleaved)
        extra = tuple(Projection(key, at, heads, outputs_of(model, at) // heads, 0) for at, key in more.items())
        vectors = tuple(Vector(at, unit) for at, unit in moving.items())
        return replace(packed, producers=packed.producers + extra, vectors=vectors, **options)
    layers: dict[str, Any] = {key: f"{path}.{name}" for key, name in zip("qkvo", names.layers)}
    return attention(model, layer, **layers, heads=heads, more=more, moving=moving, **options)
