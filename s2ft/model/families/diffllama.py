"""DiffLlama and Doge: llama with heads that stay.

DiffLlama subtracts the output of a head from that of another one, half of the heads away. Doge computes the mask of a
head from the values of all heads, by dt_proj, which is not trained.
"""

from torch import nn

from s2ft.model.coupling import Coupling
from s2ft.model.families.llama import llama_like

MODEL_TYPES = ("diffllama", "doge")


def couplings(model: nn.Module) -> list[Coupling]:
    return llama_like(model, fixed=True)
