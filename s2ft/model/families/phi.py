"""Phi: biases everywhere, two-layer FFN, `dense` after the heads. qk_layernorm's weights are shared by all heads."""

from torch import nn

from s2ft.model.builders import attention, ffn, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("phi",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, kv_heads, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        names = ("q_proj", "k_proj", "v_proj", "dense")
        found.append(ffn(i, f"{path}.mlp.fc1", f"{path}.mlp.fc2", model.config.intermediate_size))
        found.append(attention(i, [f"{path}.self_attn.{name}" for name in names], heads, head_dim, kv_heads))
    return found
