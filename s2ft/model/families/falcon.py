"""Falcon: q, k and v in one weight, in one of three orders, and a two-layer FFN.

With several key/value heads (new_decoder_architecture), each has its query heads before it. A unit of attention then is
such a group, with all its query heads. Otherwise a unit is a head: with one key/value head (multi_query) all of q come
first, and else q, k and v of each head in turn. ALiBi numbers the heads, so that they stay.
"""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import ffn, layers_of, packed_attention
from s2ft.model.coupling import Coupling, Projection

MODEL_TYPES = ("falcon",)


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, _) in enumerate(layers_of(model, "h")):
        found.append(ffn(model, i, f"{path}.mlp.dense_h_to_4h", f"{path}.mlp.dense_4h_to_h"))
        attention = _attention(model, i, f"{path}.self_attention.query_key_value", f"{path}.self_attention.dense")
        found.append(replace(attention, fixed=model.config.alibi))
    return found


def _attention(model: nn.Module, layer: int, qkv: str, o: str) -> Coupling:
    config = model.config
    if not config.new_decoder_architecture:
        return packed_attention(model, layer, qkv, o, config.num_attention_heads, not config.multi_query)
    groups, head_dim = config.num_kv_heads, config.head_dim
    queries = config.num_attention_heads // groups * head_dim
    where = {"stride": queries + 2 * head_dim, "size": groups * (queries + 2 * head_dim)}
    producers = (
        Projection("q", qkv, groups, queries, 0, **where),
        Projection("k", qkv, groups, head_dim, 0, start=queries, **where),
        Projection("v", qkv, groups, head_dim, 0, start=queries + head_dim, **where),
    )
    return Coupling("attention", layer, producers, Projection("o", o, groups, queries, 1))
