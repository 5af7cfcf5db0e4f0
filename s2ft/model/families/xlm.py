"""XLM and FlauBERT: attentions and FFNs are in two lists, with biases in all layers."""

from torch import nn

from s2ft.model.builders import attention, attention_paths, ffn, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("flaubert", "xlm")


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, _) in enumerate(layers_of(model, "ffns")):
        found.append(ffn(model, i, f"{path}.lin1", f"{path}.lin2"))
    for i, (path, _) in enumerate(layers_of(model, "attentions")):
        paths = attention_paths(path, "q_lin", "k_lin", "v_lin", "out_lin")
        found.append(attention(model, i, **paths, heads=model.config.n_heads))
    return found
