"""GPT-J: a two-layer FFN with biases beside an attention without; a part of every head is rotated."""

from torch import nn

from s2ft.model.builders import attention, ffn, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gptj",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "h")):
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        found.append(ffn(i, f"{path}.mlp.fc_in", f"{path}.mlp.fc_out", layer.mlp.fc_in.out_features))
        found.append(attention(i, [f"{path}.attn.{name}" for name in names], heads, head_dim))
    return found
