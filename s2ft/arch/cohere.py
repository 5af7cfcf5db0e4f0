"""Cohere: built like llama; use_qk_norm adds norms with weights [heads, head_dim], whose rows move with the heads."""
from typing import List

from torch import nn

from s2ft.arch.llama import llama_like
from s2ft.arch.registry import register_architecture
from s2ft.coupling import Coupling


@register_architecture("cohere")
def couplings(model: nn.Module) -> List[Coupling]:
    norms = (("q_norm.weight", 1), ("k_norm.weight", 1))
    return llama_like(model, vectors=norms if model.config.use_qk_norm else ())
