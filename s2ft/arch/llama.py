"""LLaMA and the families built like it: gated FFN, separate q, k, v, grouped-query attention.

Qwen2 adds q/k/v biases and Qwen3 norms of q and k whose weight all heads share: the biases move with
their rows, the norms stay. Rotary embeddings are the same for every head.
"""
from typing import List, Optional

from torch import nn

from s2ft.arch.registry import register_architecture
from s2ft.coupling import Coupling, Projection

# hidden_act → activation of act_mul, for those of transformers' activations that are PyTorch's own function,
# equal bit for bit. gelu_new, gelu_fast, gelu_accurate and the *_python ones follow the same formulas in
# single operators and round after each: in bfloat16 that is far from gelu.
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@register_architecture("llama", "mistral", "qwen2", "qwen3")
def couplings(model: nn.Module) -> List[Coupling]:
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    prefix = layers_path(model)
    found = []
    for i in range(config.num_hidden_layers):
        mlp, attention = f"{prefix}.{i}.mlp", f"{prefix}.{i}.self_attn"
        channels = config.intermediate_size
        found.append(Coupling("ffn", i,
                              (Projection("u", f"{mlp}.up_proj", channels, 1, 0),
                               Projection("g", f"{mlp}.gate_proj", channels, 1, 0)),
                              Projection("d", f"{mlp}.down_proj", channels, 1, 1),
                              block=mlp, activation=activation_of(model, mlp)))
        found.append(Coupling("attention", i,
                              (Projection("q", f"{attention}.q_proj", heads, head_dim, 0),
                               Projection("k", f"{attention}.k_proj", kv_heads, head_dim, 0),
                               Projection("v", f"{attention}.v_proj", kv_heads, head_dim, 0)),
                              Projection("o", f"{attention}.o_proj", heads, head_dim, 1)))
    return found


def activation_of(model: nn.Module, mlp: str) -> Optional[str]:
    """The activation of a block as its config has it, if its module is still the one that the name stands for."""
    from transformers.activations import ACT2FN   # not at the top: `import s2ft` would load transformers

    name = model.config.hidden_act
    try:
        module = model.get_submodule(f"{mlp}.act_fn")
    except AttributeError:
        return None
    untouched = name in ACTIVATIONS and type(module) is type(ACT2FN[name]) and "forward" not in module.__dict__
    return ACTIVATIONS[name] if untouched else None


def layers_path(model: nn.Module) -> str:
    """Where the decoder's layers are: `layers` in a bare LlamaModel, `model.layers` under a head."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}.layers" if prefix and hasattr(model, prefix) else "layers"
