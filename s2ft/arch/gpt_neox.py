"""GPT-NeoX (Pythia): q, k and v of each head in turn in one weight, biases, two-layer FFN."""
from typing import List

from torch import nn

from s2ft.arch.blocks import ffn, fused_attention, head_sizes, layers_of
from s2ft.arch.registry import register_architecture
from s2ft.coupling import Coupling


@register_architecture("gpt_neox")
def couplings(model: nn.Module) -> List[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        found.append(ffn(i, f"{path}.mlp.dense_h_to_4h", f"{path}.mlp.dense_4h_to_h", model.config.intermediate_size))
        found.append(fused_attention(i, f"{path}.attention.query_key_value", f"{path}.attention.dense", heads,
                                     head_dim, interleaved=True))
    return found
