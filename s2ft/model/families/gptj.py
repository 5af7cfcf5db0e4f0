"""GPT-J: two-layer FFN with biases, attention without biases; a part of every head is rotated."""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gptj",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "h")):
        ffn = {"up": f"{path}.mlp.fc_in", "down": f"{path}.mlp.fc_out"}
        found.append(Coupling.ffn(i, **ffn, channels=layer.mlp.fc_in.out_features))
        attention = attention_paths(f"{path}.attn", o="out_proj")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim))
    return found
