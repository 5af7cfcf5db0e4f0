"""BERT and RoBERTa: biases in all layers, two-layer FFN, learned positions that are added to the embeddings.

In a decoder with cross-attention, the heads of the cross-attention are another coupling.
"""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("bert", "roberta")


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "encoder.layer")):
        paths = {"up": f"{path}.intermediate.dense", "down": f"{path}.output.dense"}
        found.append(Coupling.ffn(i, **paths, channels=model.config.intermediate_size))
        found.append(_attention(model, i, f"{path}.attention", "attention"))
        if hasattr(layer, "crossattention"):
            found.append(_attention(model, i, f"{path}.crossattention", "cross-attention"))
    return found


def _attention(model: nn.Module, layer: int, path: str, kind: str) -> Coupling:
    heads, _, head_dim = head_sizes(model.config)
    paths = attention_paths(path, "self.query", "self.key", "self.value", "output.dense")
    return Coupling.attention(layer, **paths, heads=heads, head_dim=head_dim, kind=kind)
