"""BERT and types with the same modules: biases in all layers, two-layer FFN.

Positions are added to the embeddings, or rotate all heads alike (RoFormer).

In a decoder with cross-attention, the heads of the cross-attention are another coupling.
"""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = (
    "bert",
    "bert-generation",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "layoutlm",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "tapas",
    "xlm-roberta",
    "xlm-roberta-xl",
)


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
