"""GPT-NeoX (Pythia): q, k and v of each head in turn in one weight, biases, two-layer FFN."""

from torch import nn

from s2ft.model.builders import ffn, head_sizes, layers_of, packed_attention
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gpt_neox",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        found.append(ffn(i, f"{path}.mlp.dense_h_to_4h", f"{path}.mlp.dense_4h_to_h", model.config.intermediate_size))
        found.append(
            packed_attention(
                i, f"{path}.attention.query_key_value", f"{path}.attention.dense", heads, head_dim, interleaved=True
            )
        )
    return found
