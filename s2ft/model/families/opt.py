"""OPT: biases in all layers, two-layer FFN without a module around it, learned positions added to the embeddings."""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("opt",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "decoder.layers")):
        found.append(Coupling.ffn(i, up=f"{path}.fc1", down=f"{path}.fc2", channels=model.config.ffn_dim))
        attention = attention_paths(f"{path}.self_attn", o="out_proj")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim))
    return found
