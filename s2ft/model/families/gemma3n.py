"""The language model of Gemma 3n: attention and gated FFN of Gemma 3, and two small paths beside them.

Later layers use the keys and values of an earlier one (num_kv_shared_layers). Then heads of several layers belong
together and stay. LAuReL is a low-rank pair of layers. The outputs of per_layer_input_gate are multiplied by vectors
that the embeddings give, so these channels stay. AltUp mixes four streams and is not trained.
"""

from dataclasses import replace

from torch import nn

from s2ft.model.builders import ffn, head_sizes, layers_of
from s2ft.model.coupling import Coupling, Projection

MODEL_TYPES = ("gemma3n_text",)


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        mlp = f"{path}.mlp"
        found.append(ffn(model, i, f"{mlp}.up_proj", f"{mlp}.down_proj", f"{mlp}.gate_proj"))
        found.append(_attention(model, i, f"{path}.self_attn"))
        laurel = f"{path}.laurel"
        found.append(ffn(model, i, f"{laurel}.linear_left", f"{laurel}.linear_right", kind="laurel"))
        inputs = ffn(model, i, f"{path}.per_layer_input_gate", f"{path}.per_layer_projection", kind="per-layer-input")
        found.append(replace(inputs, fixed=True))
    return found


def _attention(model: nn.Module, layer: int, path: str) -> Coupling:
    heads, kv_heads, head_dim = head_sizes(model.config)
    counts = {"q": heads, "k": kv_heads, "v": kv_heads}
    own = [key for key in counts if getattr(model.get_submodule(path), f"{key}_proj", None) is not None]
    producers = tuple(Projection(key, f"{path}.{key}_proj", counts[key], head_dim, 0) for key in own)
    consumer = Projection("o", f"{path}.o_proj", heads, head_dim, 1)
    return Coupling("attention", layer, producers, consumer, fixed=bool(model.config.num_kv_shared_layers))
