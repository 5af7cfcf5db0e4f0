"""GPT-BigCode (StarCoder, SantaCoder): the blocks of GPT-2 with nn.Linear.

One key/value head comes after all query heads (multi_query). Otherwise q, k and v of each head are in turn.
"""

from torch import nn

from s2ft.model.builders import ffn, layers_of, packed_attention
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("gpt_bigcode",)


def couplings(model: nn.Module) -> list[Coupling]:
    heads, interleaved = model.config.n_head, not model.config.multi_query
    found = []
    for i, (path, _) in enumerate(layers_of(model, "h")):
        found.append(ffn(model, i, f"{path}.mlp.c_fc", f"{path}.mlp.c_proj"))
        found.append(packed_attention(model, i, f"{path}.attn.c_attn", f"{path}.attn.c_proj", heads, interleaved))
    return found
