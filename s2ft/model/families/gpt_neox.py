"""GPT-NeoX (Pythia): q, k and v of each head in turn in one weight, biases, two-layer FFN."""

from torch import nn

from s2ft.model.builders import head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gpt_neox",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        ffn = {"up": f"{path}.mlp.dense_h_to_4h", "down": f"{path}.mlp.dense_4h_to_h"}
        found.append(Coupling.ffn(i, **ffn, channels=model.config.intermediate_size))
        attention = {"qkv": f"{path}.attention.query_key_value", "o": f"{path}.attention.dense"}
        found.append(Coupling.packed_attention(i, **attention, heads=heads, head_dim=head_dim, interleaved=True))
    return found
