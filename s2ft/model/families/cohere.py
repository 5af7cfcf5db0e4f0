"""Cohere: as llama. use_qk_norm adds norms with weights [heads, head_dim], whose rows are reordered with the heads."""

from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.model.families.llama import llama_like

MODEL_TYPES = ("cohere",)


def couplings(model: nn.Module) -> list[Coupling]:
    norms = {"q_norm.weight": 1, "k_norm.weight": 1}
    return llama_like(model, moving=norms if model.config.use_qk_norm else {})
