"""The language model of Llama 3.2 Vision: llama's blocks, and blocks whose attention reads the image.

A block with cross-attention runs only with an image. Its norms of queries and keys are shared by all heads.
"""

from torch import nn

from s2ft.model.builders import attention_paths, gated_mlp, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("mllama_text_model",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
    found = []
    layers = [*layers_of(model, "layers")] or [*layers_of(model, "model.layers")]  # without or with a head
    for i, (path, layer) in enumerate(layers):
        crosses = hasattr(layer, "cross_attn")
        name, kind = ("cross_attn", "cross-attention") if crosses else ("self_attn", "attention")
        found.append(gated_mlp(model, i, f"{path}.mlp"))
        found.append(Coupling.attention(i, **attention_paths(f"{path}.{name}"), **sizes, kind=kind))
    return found
