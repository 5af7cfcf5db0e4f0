"""GPT, GPT-2 and ImageGPT: weights stored as inputs × outputs (Conv1D), packed q, k and v, biases, two-layer FFN.

A cross-attention has k and v in one weight and q in another.
"""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import attention_paths, ffn, layers_of, packed_attention
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gpt2", "imagegpt", "openai-gpt")


def couplings(model: nn.Module) -> list[Coupling]:
    config = model.config
    heads, head_dim = config.n_head, config.n_embd // config.n_head
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "h")):
        found.append(ffn(model, i, f"{path}.mlp.c_fc", f"{path}.mlp.c_proj"))
        found.append(packed_attention(model, i, f"{path}.attn.c_attn", f"{path}.attn.c_proj", heads))
        if hasattr(layer, "crossattention"):
            found.append(_cross_attention(i, f"{path}.crossattention", heads, head_dim))
    return found


def _cross_attention(layer: int, path: str, heads: int, head_dim: int) -> Coupling:
    paths = attention_paths(path, "q_attn", "c_attn", "c_attn", "c_proj")
    separate = Coupling.attention(layer, **paths, heads=heads, head_dim=head_dim, kind="cross-attention")
    q, k, v = separate.producers
    size = 2 * heads * head_dim
    return replace(separate, producers=(q, replace(k, size=size), replace(v, start=size // 2, size=size)))
