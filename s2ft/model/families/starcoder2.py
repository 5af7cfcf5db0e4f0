"""StarCoder2: llama's attention with biases, and a two-layer FFN with GPT-2's names."""

from torch import nn

from s2ft.model.builders import attention, ffn, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("starcoder2",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        found.append(ffn(i, f"{path}.mlp.c_fc", f"{path}.mlp.c_proj", model.config.intermediate_size))
        found.append(attention(i, [f"{path}.self_attn.{name}_proj" for name in "qkvo"], heads, head_dim, kv_heads))
    return found
