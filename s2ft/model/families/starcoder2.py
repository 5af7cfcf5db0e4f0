"""StarCoder2: the attention of llama with biases, and a two-layer FFN with the names of GPT-2."""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("starcoder2",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        ffn = {"up": f"{path}.mlp.c_fc", "down": f"{path}.mlp.c_proj"}
        found.append(Coupling.ffn(i, **ffn, channels=model.config.intermediate_size))
        attention = attention_paths(f"{path}.self_attn")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim, kv_heads=kv_heads))
    return found
