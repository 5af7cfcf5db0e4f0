"""Phi-3 and Phi-4: q, k and v in one weight, gate and up in one weight."""

from torch import nn

from s2ft.model.builders import head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("phi3",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    channels = model.config.intermediate_size
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        ffn = {"gate_up": f"{path}.mlp.gate_up_proj", "down": f"{path}.mlp.down_proj"}
        found.append(Coupling.packed_gated_ffn(i, **ffn, channels=channels))
        attention = {"qkv": f"{path}.self_attn.qkv_proj", "o": f"{path}.self_attn.o_proj"}
        found.append(Coupling.packed_attention(i, **attention, heads=heads, head_dim=head_dim, kv_heads=kv_heads))
    return found
