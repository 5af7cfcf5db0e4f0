"""DeepSeek-V2, V3 and types with the same modules: low-rank attention, and mixtures with shared experts.

q_proj, or q_b_proj after a low-rank q_a_proj, computes the queries. kv_b_proj computes keys and values, [key, value]
for each head in turn. The rotated part of the keys is shared by all heads. The low-rank dimensions are not units of a
coupling, so q_a_proj and kv_a_proj_with_mqa are not trained. Neither is the indexer of DeepSeek-V3.2 and GLM-5: it
chooses tokens, and no gradient passes a choice.
"""

from torch import nn

from s2ft.model.builders import heads_in, inputs_of, layers_of, outputs_of
from s2ft.model.coupling import Coupling, Projection, Vector
from s2ft.model.families.mixtral import GATES, mixture

MODEL_TYPES = (
    "axk1",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "hy_v4",
    "minicpm3",
    "mistral4",
    "sarvam_mla",
    "youtu",
)


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        found += mixture(model, i, f"{path}.mlp")
        found.append(latent_attention(model, i, f"{path}.self_attn"))
    return found


def latent_attention(model: nn.Module, layer: int, path: str) -> Coupling:
    """Describe an attention with low-rank keys and values, and the gate and the sinks of its heads."""
    block, heads = model.get_submodule(path), heads_in(model, path)
    q = f"{path}.q_b_proj" if getattr(block, "q_b_proj", None) is not None else f"{path}.q_proj"
    value, both = inputs_of(model, f"{path}.o_proj") // heads, outputs_of(model, f"{path}.kv_b_proj") // heads
    kv = dict(stride=both, size=heads * both)
    gates = [f"{path}.{name}" for name in GATES if getattr(block, name, None) is not None]
    return Coupling(
        "attention",
        layer,
        (
            Projection("q", q, heads, outputs_of(model, q) // heads, 0),
            Projection("k", f"{path}.kv_b_proj", heads, both - value, 0, **kv),
            Projection("v", f"{path}.kv_b_proj", heads, value, 0, start=both - value, **kv),
            *(Projection("q", gate, heads, outputs_of(model, gate) // heads, 0) for gate in gates),
        ),
        Projection("o", f"{path}.o_proj", heads, value, 1),
        (Vector(f"{path}.sinks", 1),) if getattr(block, "sinks", None) is not None else (),
    )
