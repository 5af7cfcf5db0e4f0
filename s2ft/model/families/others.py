"""Families whose blocks no row of names describes, a function for each.

**Conformers** (Wav2Vec2-BERT, Wav2Vec2-Conformer, Parakeet): two FFNs, attention and a convolution module in each
layer. Relative positions are projected to each head (linear_pos, relative_k_proj) and have biases of each head: both
move with the heads. So do the depthwise convolution, and the norm after it, with the channels of the convolution
module.

**Gemma 3n and 4**: attention and gated FFN of Gemma 3, and small paths beside them. Sizes of heads and numbers of
key/value heads may differ between layers (Gemma 4). A layer with full attention may use its keys as values. Later
layers may use the keys and values of an earlier one (num_kv_shared_layers). Then heads of several layers belong
together and stay. The outputs of per_layer_input_gate are multiplied by vectors that the embeddings give, so these
channels stay. LAuReL is a low-rank pair of layers. AltUp mixes four streams and is not trained.

**JetMoE**: mixtures of FFNs, and of the queries and outputs of attention. An expert of the attention has query heads of
its own, and all experts share keys and values. So heads can't move within one expert, and each expert's queries and
outputs are trained in place. Two modules, `input_linear` and `output_linear`, have the weights of all experts.

**CodeGen and Falcon**: q, k and v in one weight, in an order of their own, and a two-layer FFN. CodeGen's weight has
four parts, each with q, v and k of its heads. A unit of attention is such a part. In Falcon with several key/value
heads (new_decoder_architecture), each has its query heads before it. A unit then is such a group, with all its query
heads. Otherwise a unit is a head: with one key/value head (multi_query) all of q come first, and else q, k and v of
each head in turn. ALiBi numbers the heads, so that they stay.

**T5, mT5, UMT5, LongT5 and Pop2Piano**: two-layer or gated FFN, no biases. The first layer of the encoder and of the
decoder has a table of position biases [buckets, heads]. All layers add its values to their heads by number, so the
heads of a self-attention can't be reordered. Cross-attention has no table.

**XLM and FlauBERT**: attentions and FFNs are in two lists, with biases in all layers.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

from torch import nn

from s2ft.distributed import full_shape
from s2ft.model.builders import (
    attention,
    attention_paths,
    experts,
    ffn,
    heads_in,
    in_one_weight,
    inputs_of,
    layers_of,
    outputs_of,
    packed_attention,
)
from s2ft.model.coupling import Coupling, Projection, Vector
from s2ft.model.families.decoders import dense

# ---- conformers ----------------------------------------------------------------------------------------

WAV2VEC2 = (("intermediate_dense", "output_dense"), ("linear_q", "linear_k", "linear_v", "linear_out"), "linear_pos")
PARAKEET = (("linear1", "linear2"), ("q_proj", "k_proj", "v_proj", "o_proj"), "relative_k_proj")
CONFORMERS = {  # model type → layers of an FFN, layers of the attention, layer of the positions
    "lasr_ctc": PARAKEET,
    "parakeet_ctc": PARAKEET,
    "wav2vec2-bert": WAV2VEC2,
    "wav2vec2-conformer": WAV2VEC2,
}
FFNS = ("ffn1", "ffn2", "feed_forward1", "feed_forward2")
CONVOLUTIONS = ("conv_module", "conv")
HEAD_BIASES = ("pos_bias_u", "pos_bias_v", "bias_u", "bias_v")
NORMS = ("batch_norm", "depthwise_layer_norm", "norm")


def conformer(model: nn.Module) -> list[Coupling]:
    (up, down), names, positions = CONFORMERS[model.config.model_type]
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "encoder.layers")):
        found += [
            ffn(model, i, f"{path}.{name}.{up}", f"{path}.{name}.{down}") for name in FFNS if hasattr(layer, name)
        ]
        block, paths = layer.self_attn, [f"{path}.self_attn.{name}" for name in names]
        more = {f"{path}.self_attn.{positions}": "k"} if hasattr(block, positions) else {}
        moving = {f"{path}.self_attn.{name}": 1 for name in HEAD_BIASES if hasattr(block, name)}
        heads = heads_in(model, f"{path}.self_attn")
        found.append(attention(model, i, **dict(zip("qkvo", paths)), heads=heads, more=more, moving=moving))
        found += [_convolution(model, i, f"{path}.{name}") for name in CONVOLUTIONS if hasattr(layer, name)]
    return found


def _convolution(model: nn.Module, layer: int, path: str) -> Coupling:
    """Two pointwise convolutions, the first with a gate (GLU), and a depthwise one between them."""
    block = model.get_submodule(path)
    down, channels = f"{path}.pointwise_conv2", block.pointwise_conv2.in_channels
    between = [name for name in ("depthwise_conv", *NORMS) if hasattr(block, name)]
    vectors = tuple(
        Vector(f"{path}.{name}.{tensor}", 1)
        for name in between
        for tensor in ("weight", "bias", "running_mean", "running_var")
        if getattr(block.get_submodule(name), tensor, None) is not None
    )
    producers = in_one_weight(f"{path}.pointwise_conv1", "ug", channels)
    return Coupling("convolution", layer, producers, Projection("d", down, channels, 1, 1), vectors)


# ---- Gemma 3n and 4 ------------------------------------------------------------------------------------


def gemma(model: nn.Module) -> list[Coupling]:
    found, heads = [], model.config.num_attention_heads
    shared = bool(getattr(model.config, "num_kv_shared_layers", 0))
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found.append(dense(model, i, f"{path}.mlp"))
        if getattr(layer, "enable_moe_block", False):
            found += experts(model, i, f"{path}.experts")
        block, unit = layer.self_attn, layer.self_attn.head_dim
        own = [
            (key, f"{path}.self_attn.{key}_proj") for key in "qkv" if getattr(block, f"{key}_proj", None) is not None
        ]
        producers = tuple(Projection(key, name, outputs_of(model, name) // unit, unit, 0) for key, name in own)
        o = Projection("o", f"{path}.self_attn.o_proj", heads, unit, 1)
        found.append(Coupling("attention", i, producers, o, fixed=shared))
        if hasattr(layer, "laurel"):
            laurel = f"{path}.laurel"
            found.append(ffn(model, i, f"{laurel}.linear_left", f"{laurel}.linear_right", kind="laurel"))
        if hasattr(layer, "per_layer_projection"):
            sides = f"{path}.per_layer_input_gate", f"{path}.per_layer_projection"
            found.append(replace(ffn(model, i, *sides, kind="per-layer-input"), fixed=True))
    return found


# ---- JetMoE --------------------------------------------------------------------------------------------


def jetmoe(model: nn.Module) -> list[Coupling]:
    found, heads, size = [], model.config.num_key_value_heads, model.config.kv_channels
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        count, _, channels = full_shape(layer.mlp.output_linear.weight)
        sides = {"gate_up": f"{path}.mlp.input_linear.weight", "down": f"{path}.mlp.output_linear.weight"}
        found += Coupling.experts(i, **sides, channels=channels, experts=count)
        around = f"{path}.self_attention"
        found.append(Coupling("attention", i, in_one_weight(f"{around}.kv_proj", "kv", heads, size), None))
        for expert in range(model.config.num_local_experts):
            q = Projection("q", f"{around}.experts.input_linear.weight", heads, size, 0, expert=expert)
            o = Projection("o", f"{around}.experts.output_linear.weight", heads, size, 1, expert=expert)
            found.append(Coupling("attention experts", i, (q,), o, fixed=True))
    return found


# ---- CodeGen and Falcon --------------------------------------------------------------------------------

LAYERS = {  # model type → up, down; qkv and o
    "codegen": ("mlp.fc_in", "mlp.fc_out", "attn.qkv_proj", "attn.out_proj"),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.query_key_value", "self_attention.dense"),
}
PARTS = 4  # transformers has this number in the code of CodeGen's attention


def packed(model: nn.Module) -> list[Coupling]:
    config, found = model.config, []
    for i, (path, _) in enumerate(layers_of(model, "h")):
        up, down, qkv, o = (f"{path}.{name}" for name in LAYERS[config.model_type])
        found.append(ffn(model, i, up, down))
        if config.model_type == "codegen":
            found.append(_in_turn(i, qkv, o, PARTS, dict.fromkeys("qvk", inputs_of(model, o) // PARTS)))
        elif config.new_decoder_architecture:
            heads, size = config.num_kv_heads, config.head_dim
            widths = {"q": config.num_attention_heads // heads * size, "k": size, "v": size}
            found.append(replace(_in_turn(i, qkv, o, heads, widths), fixed=config.alibi))
        else:
            whole = packed_attention(model, i, qkv, o, config.num_attention_heads, not config.multi_query)
            found.append(replace(whole, fixed=config.alibi))
    return found


def _in_turn(layer: int, qkv: str, o: str, units: int, widths: dict[str, int]) -> Coupling:
    """Describe a weight that has q, k and v of each unit in turn, with these widths and in this order."""
    stride = sum(widths.values())
    starts = dict(zip(widths, accumulate(widths.values(), initial=0)))
    producers = tuple(
        Projection(key, qkv, units, widths[key], 0, start=starts[key], stride=stride, size=units * stride)
        for key in "qkv"
    )
    return Coupling("attention", layer, producers, Projection("o", o, units, widths["q"], 1))


# ---- T5 ------------------------------------------------------------------------------------------------

SELF_ATTENTIONS = ("SelfAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")


def t5(model: nn.Module) -> list[Coupling]:
    config, found = model.config, []
    sizes = {"heads": config.num_heads, "head_dim": config.d_kv}
    for i, (path, block) in enumerate([*layers_of(model, "encoder.block"), *layers_of(model, "decoder.block")]):
        name = next(name for name in SELF_ATTENTIONS if hasattr(block.layer[0], name))
        found.append(Coupling.attention(i, **attention_paths(f"{path}.layer.0.{name}", *"qkvo"), **sizes, fixed=True))
        dense = f"{path}.layer.{len(block.layer) - 1}.DenseReluDense"
        up, gate = (f"{dense}.wi_1", f"{dense}.wi_0") if config.is_gated_act else (f"{dense}.wi", None)
        found.append(ffn(model, i, up, f"{dense}.wo", gate))
        if block.is_decoder:
            paths = attention_paths(f"{path}.layer.1.EncDecAttention", *"qkvo")
            found.append(Coupling.attention(i, **paths, **sizes, kind="cross-attention"))
    return found


# ---- XLM -----------------------------------------------------------------------------------------------


def xlm(model: nn.Module) -> list[Coupling]:
    ffns = [ffn(model, i, f"{path}.lin1", f"{path}.lin2") for i, (path, _) in enumerate(layers_of(model, "ffns"))]
    names, heads = ("q_lin", "k_lin", "v_lin", "out_lin"), model.config.n_heads
    return ffns + [
        attention(model, i, **attention_paths(path, *names), heads=heads)
        for i, (path, _) in enumerate(layers_of(model, "attentions"))
    ]


FAMILIES: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    **dict.fromkeys(CONFORMERS, conformer),
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), gemma),
    "jetmoe": jetmoe,
    **dict.fromkeys(LAYERS, packed),
    **dict.fromkeys(("longt5", "mt5", "pop2piano", "t5", "umt5"), t5),
    **dict.fromkeys(("flaubert", "xlm"), xlm),
}
