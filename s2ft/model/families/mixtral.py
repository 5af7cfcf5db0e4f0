"""Mixtral, Qwen2-MoE and Qwen3-MoE: llama's attention; in place of the FFN experts, whose channels are chosen one by
one in each, and in Qwen2-MoE an expert that every token passes. The router is no part of a coupling.
"""

from torch import nn

from s2ft.model.builders import attention_paths, experts, gated_mlp, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found += mixture(model, i, f"{path}.mlp", layer.mlp, "shared_expert")
        attention = attention_paths(f"{path}.self_attn")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim, kv_heads=kv_heads))
    return found


def mixture(model: nn.Module, layer: int, path: str, mlp: nn.Module, shared: str) -> list[Coupling]:
    """Of a block that is a mixture, perhaps with a module `shared`, or a plain gated FFN."""
    if not hasattr(mlp, "experts"):
        return [gated_mlp(model, layer, path)]
    found = experts(model, layer, f"{path}.experts")
    if getattr(mlp, shared, None) is not None:
        channels = mlp.get_submodule(shared).down_proj.in_features
        found.append(gated_mlp(model, layer, f"{path}.{shared}", channels, kind="shared-expert"))
    return found
