"""Phi: biases in all layers, two-layer FFN, output projection `dense`. All heads share the weights of qk_layernorm."""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("phi",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        ffn = {"up": f"{path}.mlp.fc1", "down": f"{path}.mlp.fc2"}
        found.append(Coupling.ffn(i, **ffn, channels=model.config.intermediate_size))
        attention = attention_paths(f"{path}.self_attn", o="dense")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim, kv_heads=kv_heads))
    return found
