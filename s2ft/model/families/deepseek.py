"""DeepSeek-V2, V3 and types with the same modules: low-rank attention, and mixtures with shared experts.

q_proj, or q_b_proj after a low-rank q_a_proj, computes the queries. kv_b_proj computes keys and values, [key, value]
for each head in turn. The rotated part of the keys is shared by all heads. The low-rank dimensions are not units of a
coupling, so q_a_proj and kv_a_proj_with_mqa are not trained. Neither is
the indexer of DeepSeek-V3.2 and GLM-5: it only chooses tokens, so no gradient reaches it.
"""

from torch import nn

from s2ft.model.builders import layers_of
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.families.mixtral import mixture

MODEL_TYPES = ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "mistral4", "sarvam_mla", "youtu")


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found += mixture(model, i, f"{path}.mlp", layer.mlp)
        found.append(_attention(model.config, i, f"{path}.self_attn"))
    return found


def _attention(config, layer: int, path: str) -> Coupling:
    heads, key, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    q = f"{path}.q_proj" if config.q_lora_rank is None else f"{path}.q_b_proj"
    kv = dict(stride=key + value, size=heads * (key + value))
    return Coupling(
        "attention",
        layer,
        (
            Projection("q", q, heads, key + config.qk_rope_head_dim, 0),
            Projection("k", f"{path}.kv_b_proj", heads, key, 0, **kv),
            Projection("v", f"{path}.kv_b_proj", heads, value, 0, start=key, **kv),
        ),
        Projection("o", f"{path}.o_proj", heads, value, 1),
    )
