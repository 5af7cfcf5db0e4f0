"""JetMoE: mixtures of FFNs, and of the queries and outputs of attention.

An expert of the attention has query heads of its own, and all experts share keys and values. So heads can't move within
one expert, and each expert's queries and outputs are trained in place. Two modules, `input_linear` and `output_linear`,
have the weights of all experts.
"""

from torch import nn

from s2ft.distributed import full_shape
from s2ft.model.builders import layers_of
from s2ft.model.coupling import Coupling, Projection

MODEL_TYPES = ("jetmoe",)


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        count, _, channels = full_shape(layer.mlp.output_linear.weight)
        sides = {"gate_up": f"{path}.mlp.input_linear.weight", "down": f"{path}.mlp.output_linear.weight"}
        found += Coupling.experts(i, **sides, channels=channels, experts=count)
        found += _attention(model.config, i, f"{path}.self_attention")
    return found


def _attention(config, layer: int, path: str) -> list[Coupling]:
    heads, size = config.num_key_value_heads, config.kv_channels
    both = {"size": 2 * heads * size}
    keys = (
        Projection("k", f"{path}.kv_proj", heads, size, 0, **both),
        Projection("v", f"{path}.kv_proj", heads, size, 0, start=heads * size, **both),
    )
    found = [Coupling("attention", layer, keys, None)]
    for expert in range(config.num_local_experts):
        q = Projection("q", f"{path}.experts.input_linear.weight", heads, size, 0, expert=expert)
        o = Projection("o", f"{path}.experts.output_linear.weight", heads, size, 1, expert=expert)
        found.append(Coupling("attention experts", layer, (q,), o, fixed=True))
    return found
