"""StableLM: built like llama. qk_layernorm adds a norm module of its own for every head, and with it heads stay."""
from typing import List

from torch import nn

from s2ft.arch.llama import llama_like
from s2ft.arch.registry import register_architecture
from s2ft.coupling import Coupling


@register_architecture("stablelm")
def couplings(model: nn.Module) -> List[Coupling]:
    return llama_like(model, fixed=model.config.qk_layernorm)
