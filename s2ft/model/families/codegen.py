"""CodeGen: a two-layer FFN, and q, v and k in one weight that has four parts, each with q, v and k of its heads.

A unit of attention is such a part, with a quarter of the heads.
"""

from torch import nn

from s2ft.model.builders import ffn, inputs_of, layers_of
from s2ft.model.coupling import Coupling, Projection

MODEL_TYPES = ("codegen",)
PARTS = 4  # transformers has this number in the code of the attention


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, _) in enumerate(layers_of(model, "h")):
        found.append(ffn(model, i, f"{path}.mlp.fc_in", f"{path}.mlp.fc_out"))
        found.append(_attention(model, i, f"{path}.attn.qkv_proj", f"{path}.attn.out_proj"))
    return found


def _attention(model: nn.Module, layer: int, qkv: str, o: str) -> Coupling:
    width = inputs_of(model, o) // PARTS
    producers = tuple(
        Projection(key, qkv, PARTS, width, 0, start=start * width, stride=3 * width, size=3 * PARTS * width)
        for key, start in (("q", 0), ("k", 2), ("v", 1))
    )
    return Coupling("attention", layer, producers, Projection("o", o, PARTS, width, 1))
