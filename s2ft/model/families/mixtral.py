"""Mixtral, Qwen2-MoE, Qwen3-MoE, Phi-3.5-MoE and Mellum: the attention of llama, and experts in place of the FFN.

Channels are selected in each expert separately. Qwen2-MoE also has a shared expert, which processes every token. The
router is not part of a coupling.
"""

from torch import nn

from s2ft.model.builders import attention_paths, experts, gated_mlp, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("mellum", "mixtral", "phimoe", "qwen2_moe", "qwen3_moe")
SINCE = {"phimoe": "5.1"}


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found += mixture(model, i, f"{path}.mlp", layer.mlp, "shared_expert")
        attention = attention_paths(f"{path}.self_attn")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim, kv_heads=kv_heads))
    return found


def mixture(model: nn.Module, layer: int, path: str, mlp: nn.Module, shared: str) -> list[Coupling]:
    """List the couplings of a block: of a mixture, with the expert `shared` if it has one, or of a plain gated FFN."""
    if not hasattr(mlp, "experts"):
        return [gated_mlp(model, layer, path)]
    found = experts(model, layer, f"{path}.experts")
    if getattr(mlp, shared, None) is not None:
        channels = mlp.get_submodule(shared).down_proj.in_features
        found.append(gated_mlp(model, layer, f"{path}.{shared}", channels, kind="shared-expert"))
    return found
