"""Phi-3 and Phi-4: q, k and v in one weight, gate and up in one weight."""

from torch import nn

from s2ft.model.builders import gate_up, head_sizes, layers_of, packed_attention
from s2ft.model.coupling import Coupling, Projection

MODEL_TYPES = ("phi3",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    channels = model.config.intermediate_size
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        found.append(
            Coupling(
                "ffn",
                i,
                gate_up(f"{path}.mlp.gate_up_proj", channels),
                Projection("d", f"{path}.mlp.down_proj", channels, 1, 1),
            )
        )
        found.append(
            packed_attention(i, f"{path}.self_attn.qkv_proj", f"{path}.self_attn.o_proj", heads, head_dim, kv_heads)
        )
    return found
