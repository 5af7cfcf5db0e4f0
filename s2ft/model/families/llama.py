"""LLaMA and the families built like it: gated FFN, separate q, k, v, grouped-query attention.

Qwen2 adds q/k/v biases, which move with their rows. Qwen3 and Gemma 3 norm q and k with a weight that
all heads share, so it stays. Rotary embeddings, sliding windows and the layers without rotary embeddings
(SmolLM3, Cohere 2) are the same for every head.
"""

from torch import nn

from s2ft.model.builders import attention, gated_mlp, head_sizes, layers_of
from s2ft.model.coupling import Coupling, Vector

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3", "cohere2")


def couplings(model: nn.Module) -> list[Coupling]:
    return llama_like(model)


def llama_like(model: nn.Module, vectors: tuple[tuple[str, int], ...] = (), fixed: bool = False) -> list[Coupling]:
    """Couplings of a model with llama's modules. vectors: (parameter of self_attn, unit) that move with the heads;
    fixed: whether heads can't move."""
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        block = f"{path}.self_attn"
        found.append(gated_mlp(model, i, f"{path}.mlp"))
        found.append(
            attention(
                i,
                [f"{block}.{name}_proj" for name in "qkvo"],
                heads,
                head_dim,
                kv_heads,
                fixed=fixed,
                vectors=tuple(Vector(f"{block}.{name}", unit) for name, unit in vectors),
            )
        )
    return found
