"""Mixtral, Qwen3-MoE, GLM-4 MoE and similar: the attention of llama, and experts in place of the FFN.

Channels are selected in each expert separately. An expert that processes every token (shared) is a coupling of its own.
Some layers may have a plain FFN. The router is not part of a coupling.

Norms of q and k over all heads (MiniMax M2, OLMoE) and sinks (Flint) move with the heads. A norm of each head that all
heads share stays. A gate of the heads' outputs (Trinity, Laguna) belongs to the queries.
"""

from torch import nn

from s2ft.model.builders import (
    attention,
    attention_paths,
    experts,
    ffn,
    gated_mlp,
    heads_in,
    inputs_of,
    layers_of,
    moving_with_heads,
)
from s2ft.model.coupling import Coupling

MODEL_TYPES = (
    "afmoe",
    "beam",
    "cohere2_moe",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "glm4_moe",
    "glm4v_moe_text",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe_text",
    "sarvam_moe",
    "solar_open",
)
SINCE = {"afmoe": "5.5", "hunyuan_v1_moe": "5.1", "phimoe": "5.1"}
SHARED = ("shared_expert", "shared_experts", "shared_mlp")  # names of the expert that processes every token
GATES = ("gate_proj", "g_proj")  # names of the gate of an attention's output
# Names of a feed-forward block's layers: up, down and gate, or up and gate in one
FFNS = (
    ("up_proj", "down_proj", "gate_proj"),
    ("w3", "w2", "w1"),
    ("gate_up_proj", "down_proj", None),
    ("input_linear", "output_linear", None),
)


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        found += mixture(model, i, f"{path}.mlp")
        found.append(self_attention(model, i, f"{path}.self_attn"))
    return found


def self_attention(model: nn.Module, layer: int, path: str, fixed: bool = False) -> Coupling:
    """Describe an attention with separate q, k and v, and with what moves with its heads."""
    block, heads = model.get_submodule(path), heads_in(model, path)
    paths = attention_paths(path, o="o_proj" if hasattr(block, "o_proj") else "out_proj")
    moving = moving_with_heads(model, path, heads, inputs_of(model, paths["o"]) // heads)
    more = {f"{path}.{name}": "q" for name in GATES if getattr(block, name, None) is not None}
    return attention(model, layer, **paths, heads=heads, more=more, moving=moving, fixed=fixed)


def mixture(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """List the couplings of a block: of a mixture, with its shared expert if it has one, or of a plain FFN."""
    mlp = model.get_submodule(path)
    if not hasattr(mlp, "experts"):
        return [dense(model, layer, path)]
    found = experts(model, layer, f"{path}.experts")
    shared = [name for name in SHARED if getattr(mlp, name, None) is not None]
    return found + [dense(model, layer, f"{path}.{name}", kind="shared-expert") for name in shared]


def dense(model: nn.Module, layer: int, path: str, kind: str = "ffn") -> Coupling:
    """Describe a gated feed-forward block under any of its names."""
    block = model.get_submodule(path)
    up, down, gate = next(names for names in FFNS if hasattr(block, names[0]))
    if gate == "gate_proj" and hasattr(block, gate):
        return gated_mlp(model, layer, path, inputs_of(model, f"{path}.{down}"), kind=kind)
    gate = f"{path}.{gate}" if gate and hasattr(block, gate) else None
    return ffn(model, layer, f"{path}.{up}", f"{path}.{down}", gate, kind=kind)
