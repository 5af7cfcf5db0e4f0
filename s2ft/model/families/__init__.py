"""Model families: one small file each, with the couplings of the model types it names."""

from collections.abc import Callable

from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.model.families import (
    bert,
    clip,
    cohere,
    deepseek,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mixtral,
    olmo2,
    opt,
    phi,
    phi3,
    stablelm,
    starcoder2,
    t5,
    vit,
    whisper,
)

# A new family is one file and its name here.
_MODULES = (
    bert,
    clip,
    cohere,
    deepseek,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mixtral,
    olmo2,
    opt,
    phi,
    phi3,
    stablelm,
    starcoder2,
    t5,
    vit,
    whisper,
)

FAMILIES: dict[str, Callable[[nn.Module], list[Coupling]]] = {
    model_type: module.couplings for module in _MODULES for model_type in module.MODEL_TYPES
}
