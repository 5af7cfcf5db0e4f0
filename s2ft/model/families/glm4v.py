"""The language models of GLM-4.1V and GLM-OCR: separate q, k and v, gate and up in one weight, norms after each part."""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("glm4v_text", "glm_ocr_text")


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        ffn = {"gate_up": f"{path}.mlp.gate_up_proj", "down": f"{path}.mlp.down_proj"}
        found.append(Coupling.packed_gated_ffn(i, **ffn, channels=layer.mlp.down_proj.in_features))
        found.append(Coupling.attention(i, **attention_paths(f"{path}.self_attn"), **sizes))
    return found
