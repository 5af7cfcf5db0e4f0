"""OLMo 2: built like llama, with norms of q and k over all heads, whose weights move with the heads."""
from typing import List

from torch import nn

from s2ft.arch.blocks import head_sizes
from s2ft.arch.llama import llama_like
from s2ft.arch.registry import register_architecture
from s2ft.coupling import Coupling


@register_architecture("olmo2")
def couplings(model: nn.Module) -> List[Coupling]:
    _, _, head_dim = head_sizes(model.config)
    return llama_like(model, vectors=(("q_norm.weight", head_dim), ("k_norm.weight", head_dim)))
