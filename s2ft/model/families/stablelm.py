"""StableLM: as llama. qk_layernorm adds a norm module for every head; heads with it can't be reordered."""

from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.model.families.llama import llama_like

MODEL_TYPES = ("stablelm",)


def couplings(model: nn.Module) -> list[Coupling]:
    return llama_like(model, fixed=model.config.qk_layernorm)
