"""GPT-OSS, Aria, Llama 4, Nemotron-H and Muse Spark: mixtures whose experts are stored or computed in another way.

GPT-OSS stores [experts, inputs, outputs], gate and up of each channel in turn, with a bias that moves with its channel.
Aria and Llama 4 are transposed too. Every expert of Llama 4 gets every token, with weight 0 if it was not chosen.
Nemotron-H has no gate; a layer of it is one block, which is a mixture, an FFN, an attention or a state space. Muse
Spark has a norm after each expert. The last two may project tokens to a smaller width for their experts, and back.
"""

from torch import nn

from s2ft.model.builders import inputs_of, layers_of
from s2ft.model.coupling import Coupling
from s2ft.model.families.mixtral import mixture, self_attention
from s2ft.model.families.recurrent import mamba

MODEL_TYPES = ("aria_text", "gpt_oss", "llama4_text", "muse_spark_text", "nemotron_h", "openai_privacy_filter")
SINCE = {"aria_text": "5.18", "gpt_oss": "5.7", "nemotron_h": "5.15"}
# Layers from the model's width to that of the experts, and back
WIDTHS = ("pre_expert_proj", "post_expert_proj", "fc1_latent_proj", "fc2_latent_proj")


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    layers = list(layers_of(model, "layers")) or layers_of(model, "model.layers")  # the second for Llama 4
    for i, (path, layer) in enumerate(layers):
        if hasattr(layer, "mixer"):
            found += _mixer(model, i, f"{path}.mixer")
            continue
        found += _mixture(model, i, f"{path}.{'mlp' if hasattr(layer, 'mlp') else 'feed_forward'}")
        found.append(self_attention(model, i, f"{path}.self_attn"))
    return found


def _mixture(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    found, block = mixture(model, layer, path), model.get_submodule(path)
    for name in WIDTHS:
        if isinstance(getattr(block, name, None), nn.Linear):
            one = f"{path}.{name}"
            found.append(Coupling.one_sided(layer, path=one, count=inputs_of(model, one)))
    return found


def _mixer(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    block = model.get_submodule(path)
    if hasattr(block, "q_proj"):
        return [self_attention(model, layer, path)]
    return mamba(model, layer, path) if hasattr(block, "in_proj") else _mixture(model, layer, path)
