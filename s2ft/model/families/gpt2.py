"""GPT-2: weights stored as inputs × outputs (Conv1D), q, k and v in one, biases, two-layer FFN.

A cross-attention has its k and v in one weight and its q in another.
"""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import attention, ffn, layers_of, packed_attention
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gpt2",)


def couplings(model: nn.Module) -> list[Coupling]:
    config = model.config
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "h")):
        found.append(ffn(i, f"{path}.mlp.c_fc", f"{path}.mlp.c_proj", layer.mlp.c_fc.nf))
        found.append(packed_attention(i, f"{path}.attn.c_attn", f"{path}.attn.c_proj", heads, head_dim))
        if hasattr(layer, "crossattention"):
            found.append(_cross_attention(i, f"{path}.crossattention", heads, head_dim))
    return found


def _cross_attention(layer: int, path: str, heads: int, head_dim: int) -> Coupling:
    names = ("q_attn", "c_attn", "c_attn", "c_proj")
    plain = attention(layer, [f"{path}.{name}" for name in names], heads, head_dim, kind="cross-attention")
    q, k, v = plain.producers
    size = 2 * heads * head_dim
    return replace(plain, producers=(q, replace(k, size=size), replace(v, start=size // 2, size=size)))
