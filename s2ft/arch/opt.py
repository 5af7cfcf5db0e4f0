"""OPT: biases everywhere, two-layer FFN in the layer itself. Positions are learned and added to the embeddings."""
from typing import List

from torch import nn

from s2ft.arch.blocks import attention, ffn, head_sizes, layers_of
from s2ft.arch.registry import register_architecture
from s2ft.coupling import Coupling


@register_architecture("opt")
def couplings(model: nn.Module) -> List[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "decoder.layers")):
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        found.append(ffn(i, f"{path}.fc1", f"{path}.fc2", model.config.ffn_dim))
        found.append(attention(i, [f"{path}.self_attn.{name}" for name in names], heads, head_dim))
    return found
