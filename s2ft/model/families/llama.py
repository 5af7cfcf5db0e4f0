"""LLaMA and families of the same structure: gated FFN, separate q, k and v, grouped-query attention.

Qwen2 adds biases to q, k and v, which are reordered with their rows. Qwen3, Gemma 3, EXAONE 4 and Hunyuan normalise q
and k by a weight that all heads share, so it stays. Rotary embeddings, sliding windows and layers without rotary
embeddings (SmolLM3, Cohere 2) are the same for every head.
"""

from collections.abc import Mapping

from torch import nn

from s2ft.model.builders import attention_paths, gated_mlp, head_sizes, layers_of, moving_with_heads
from s2ft.model.coupling import Coupling

MODEL_TYPES = (
    "cohere2",
    "cwm",
    "emu3_text_model",
    "ernie4_5",
    "eurobert",
    "exaone",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "granite_swa",
    "gte",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "molmo2_text",
    "nomic_bert",
    "olmo",
    "paddleocr_vl_text",
    "qwen2",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
    "seed_oss",
    "smollm3",
    "ultrabert",
    "vaultgemma",
)


def couplings(model: nn.Module) -> list[Coupling]:
    return llama_like(model)


def llama_like(model: nn.Module, moving: Mapping[str, int] | None = None, fixed: bool = False) -> list[Coupling]:
    """List the couplings of a model with llama's modules.

    Args:
        model: The model.
        moving: Parameters of self_attn that are reordered with the heads, and how many entries belong to one head.
        fixed: Whether heads can't move.
    """
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        block = f"{path}.self_attn"
        found.append(gated_mlp(model, i, f"{path}.mlp"))
        sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
        vectors = {f"{block}.{name}": unit for name, unit in (moving or {}).items()}
        vectors |= moving_with_heads(model, block, heads, head_dim) if moving is None else {}
        found.append(Coupling.attention(i, **attention_paths(block), **sizes, moving=vectors, fixed=fixed))
    return found
