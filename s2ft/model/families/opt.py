"""OPT: biases everywhere, two-layer FFN in the layer itself. Positions are learned and added to the embeddings."""

from torch import nn

from s2ft.model.builders import attention, ffn, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("opt",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "decoder.layers")):
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        found.append(ffn(i, f"{path}.fc1", f"{path}.fc2", model.config.ffn_dim))
        found.append(attention(i, [f"{path}.self_attn.{name}" for name in names], heads, head_dim))
    return found
