"""OLMo 2, OLMo 3 and ESM C: llama with norms of q and k over all heads. Their weights are reordered with the heads."""

from torch import nn

from s2ft.model.builders import head_sizes
from s2ft.model.coupling import Coupling
from s2ft.model.families.llama import llama_like

MODEL_TYPES = ("esmc", "olmo2", "olmo3")


def couplings(model: nn.Module) -> list[Coupling]:
    _, _, head_dim = head_sizes(model.config)
    return llama_like(model, moving={"q_norm.weight": head_dim, "k_norm.weight": head_dim})
