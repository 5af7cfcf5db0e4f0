"""LLaMA and families of the same structure: gated FFN, separate q, k and v, grouped-query attention.

Qwen2 adds biases to q, k and v, which are reordered with their rows. Qwen3, Gemma 3, EXAONE 4 and Hunyuan normalise q
and k by a weight that all heads share, so it stays. That of OLMo 2, OLMo 3, ESM C and Cohere is over all heads, and
moves with them. Rotary embeddings, sliding windows and layers without rotary embeddings (SmolLM3, Cohere 2) are the
same for every head.

Heads stay in DiffLlama, which subtracts the output of a head from that of another one, half of the heads away; in Doge,
which computes the mask of a head from the values of all heads, by dt_proj, which is not trained; and in StableLM with
qk_layernorm, a norm module for every head.
"""

from torch import nn

from s2ft.model.builders import attention_paths, gated_mlp, head_sizes, layers_of, moving_with_heads
from s2ft.model.coupling import Coupling

MODEL_TYPES = (
    "cohere",
    "cohere2",
    "cwm",
    "diffllama",
    "doge",
    "emu3_text_model",
    "ernie4_5",
    "esmc",
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
    "olmo2",
    "olmo3",
    "paddleocr_vl_text",
    "qwen2",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_vl_text",
    "seed_oss",
    "smollm3",
    "stablelm",
    "ultrabert",
    "vaultgemma",
)


def couplings(model: nn.Module) -> list[Coupling]:
    kind = model.config.model_type
    fixed = kind in ("diffllama", "doge") or kind == "stablelm" and model.config.qk_layernorm
    heads, kv_heads, head_dim = head_sizes(model.config)
    sizes = {"heads": heads, "head_dim": head_dim, "kv_heads": kv_heads}
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        block = f"{path}.self_attn"
        moving = {} if fixed else moving_with_heads(model, block, heads, head_dim)
        found.append(gated_mlp(model, i, f"{path}.mlp"))
        found.append(Coupling.attention(i, **attention_paths(block), **sizes, moving=moving, fixed=fixed))
    return found
