"""ViT, DeiT, I-JEPA and ViT-MSN: two-layer FFN, q, k and v with or without biases, positions in the embeddings."""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("deit", "ijepa", "vit", "vit_msn")
SINCE = "5.9"


def couplings(model: nn.Module) -> list[Coupling]:
    heads, _, head_dim = head_sizes(model.config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, "layers")):
        ffn = {"up": f"{path}.mlp.fc1", "down": f"{path}.mlp.fc2"}
        found.append(Coupling.ffn(i, **ffn, channels=model.config.intermediate_size))
        attention = attention_paths(f"{path}.attention")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim))
    return found
