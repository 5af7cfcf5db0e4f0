"""CodeGen and Falcon: q, k and v in one weight, in an order of their own, and a two-layer FFN.

CodeGen's weight has four parts, each with q, v and k of its heads. A unit of attention is such a part.

In Falcon with several key/value heads (new_decoder_architecture), each has its query heads before it. A unit then is
such a group, with all its query heads. Otherwise a unit is a head: with one key/value head (multi_query) all of q come
first, and else q, k and v of each head in turn. ALiBi numbers the heads, so that they stay.
"""

from dataclasses import replace
from itertools import accumulate

from torch import nn

from s2ft.model.builders import ffn, inputs_of, layers_of, packed_attention
from s2ft.model.coupling import Coupling, Projection

LAYERS = {  # model type → up, down; qkv and o
    "codegen": ("mlp.fc_in", "mlp.fc_out", "attn.qkv_proj", "attn.out_proj"),
    "falcon": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.query_key_value", "self_attention.dense"),
}
MODEL_TYPES = tuple(LAYERS)
PARTS = 4  # transformers has this number in the code of CodeGen's attention


def couplings(model: nn.Module) -> list[Coupling]:
    config, found = model.config, []
    describe = _codegen_attention if config.model_type == "codegen" else _falcon_attention
    for i, (path, _) in enumerate(layers_of(model, "h")):
        up, down, qkv, o = (f"{path}.{name}" for name in LAYERS[config.model_type])
        found += [ffn(model, i, up, down), describe(model, i, qkv, o)]
    return found


def _codegen_attention(model: nn.Module, layer: int, qkv: str, o: str) -> Coupling:
    return _in_turn(layer, qkv, o, PARTS, dict.fromkeys("qvk", inputs_of(model, o) // PARTS))


def _falcon_attention(model: nn.Module, layer: int, qkv: str, o: str) -> Coupling:
    config = model.config
    heads, size = config.num_attention_heads, config.head_dim
    if config.new_decoder_architecture:
        widths = {"q": heads // config.num_kv_heads * size, "k": size, "v": size}
        found = _in_turn(layer, qkv, o, config.num_kv_heads, widths)
    else:
        found = packed_attention(model, layer, qkv, o, heads, not config.multi_query)
    return replace(found, fixed=config.alibi)


def _in_turn(layer: int, qkv: str, o: str, units: int, widths: dict[str, int]) -> Coupling:
    """Describe a weight that has q, k and v of each unit in turn, with these widths and in this order."""
    stride = sum(widths.values())
    starts = dict(zip(widths, accumulate(widths.values(), initial=0)))
    producers = tuple(
        Projection(key, qkv, units, widths[key], 0, start=starts[key], stride=stride, size=units * stride)
        for key in "qkv"
    )
    return Coupling("attention", layer, producers, Projection("o", o, units, widths["q"], 1))
