"""The language models of Gemma 3n and Gemma 4: attention and gated FFN of Gemma 3, and small paths beside them.

Sizes of heads and numbers of key/value heads may differ between layers (Gemma 4). A layer with full attention may use
its keys as values. Later layers may use the keys and values of an earlier one (num_kv_shared_layers). Then heads of
several layers belong together and stay.

The outputs of per_layer_input_gate are multiplied by vectors that the embeddings give, so these channels stay. LAuReL
is a low-rank pair of layers. AltUp mixes four streams and is not trained.
"""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import experts, ffn, layers_of, outputs_of
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.families.decoders import dense

MODEL_TYPES = ("gemma3n_text", "gemma4_text", "gemma4_unified_text")


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        found.append(dense(model, i, f"{path}.mlp"))
        if getattr(layer, "enable_moe_block", False):
            found += experts(model, i, f"{path}.experts")
        found.append(_attention(model, i, f"{path}.self_attn"))
        if hasattr(layer, "laurel"):
            laurel = f"{path}.laurel"
            found.append(ffn(model, i, f"{laurel}.linear_left", f"{laurel}.linear_right", kind="laurel"))
        if hasattr(layer, "per_layer_projection"):
            sides = f"{path}.per_layer_input_gate", f"{path}.per_layer_projection"
            found.append(replace(ffn(model, i, *sides, kind="per-layer-input"), fixed=True))
    return found


def _attention(model: nn.Module, layer: int, path: str) -> Coupling:
    block, heads = model.get_submodule(path), model.config.num_attention_heads
    own = [(key, f"{path}.{key}_proj") for key in "qkv" if getattr(block, f"{key}_proj", None) is not None]
    unit = block.head_dim
    producers = tuple(Projection(key, name, outputs_of(model, name) // unit, unit, 0) for key, name in own)
    shared = bool(getattr(model.config, "num_kv_shared_layers", 0))
    return Coupling("attention", layer, producers, Projection("o", f"{path}.o_proj", heads, unit, 1), fixed=shared)
