"""The language model of Gemma 4: head sizes and numbers of key/value heads that differ between layers.

A layer with full attention may use its keys as values, and later layers may use the keys and values of an earlier one.
Then heads of several layers belong together, and can't move.

With per-layer inputs, the outputs of per_layer_input_gate are multiplied by vectors that the embeddings give, so these
channels can't move.
"""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import attention_paths, experts, gated_mlp, layers_of
from s2ft.model.coupling import Coupling, Projection

MODEL_TYPES = ("gemma4_text", "gemma4_unified_text")


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found.append(gated_mlp(model, i, f"{path}.mlp", layer.mlp.down_proj.in_features))
        if getattr(layer, "enable_moe_block", False):
            found += experts(model, i, f"{path}.experts")
        found.append(_attention(model.config, i, f"{path}.self_attn", layer.self_attn))
        if hasattr(layer, "per_layer_projection"):
            paths = {"up": f"{path}.per_layer_input_gate", "down": f"{path}.per_layer_projection"}
            channels = layer.per_layer_projection.in_features
            found.append(replace(Coupling.ffn(i, **paths, channels=channels, kind="per-layer-input"), fixed=True))
    return found


def _attention(config, layer: int, path: str, attention: nn.Module) -> Coupling:
    heads, head_dim = config.num_attention_heads, attention.head_dim
    own = [(key, name) for key in "qkv" if isinstance(getattr(attention, name := f"{key}_proj", None), nn.Module)]
    producers = tuple(
        Projection(key, f"{path}.{name}", attention.get_submodule(name).out_features // head_dim, head_dim, 0)
        for key, name in own
    )
    shared = bool(getattr(config, "num_kv_shared_layers", 0))
    consumer = Projection("o", attention_paths(path)["o"], heads, head_dim, 1)
    return Coupling("attention", layer, producers, consumer, fixed=shared)
