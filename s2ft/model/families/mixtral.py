"""Mixtral, Qwen2-MoE, Qwen3-MoE, GLM-4 MoE and similar: the attention of llama, and experts in place of the FFN.

Channels are selected in each expert separately. An expert that processes every token (shared) is a coupling of its own.
Some layers may have a plain FFN. The router is not part of a coupling.

Norms of q and k over all heads (MiniMax M2) and sinks (Flint) move with the heads. A norm of each head that all heads
share stays.
"""

from torch import nn

from s2ft.model.builders import attention_paths, experts, gated_mlp, head_sizes, layers_of, moving_with_heads
from s2ft.model.coupling import Coupling

MODEL_TYPES = (
    "cohere2_moe",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "mellum",
    "minimax_m2",
    "mixtral",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "sarvam_moe",
    "solar_open",
)
SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # names of the expert that processes every token


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found += mixture(model, i, f"{path}.mlp", layer.mlp)
        block = f"{path}.self_attn"
        moving = moving_with_heads(model, block, heads, head_dim)
        sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
        found.append(Coupling.attention(i, **attention_paths(block), **sizes, moving=moving))
    return found


def mixture(model: nn.Module, layer: int, path: str, mlp: nn.Module) -> list[Coupling]:
    """List the couplings of a block: of a mixture, with its shared expert if it has one, or of a plain gated FFN."""
    if not hasattr(mlp, "experts"):
        return [gated_mlp(model, layer, path, mlp.down_proj.in_features)]
    found = experts(model, layer, f"{path}.experts")
    for name in SHARED:
        if getattr(mlp, name, None) is not None:
            channels = mlp.get_submodule(name).down_proj.in_features
            found.append(gated_mlp(model, layer, f"{path}.{name}", channels, kind="shared-expert"))
    return found
