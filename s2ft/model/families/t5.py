"""T5, mT5, UMT5, LongT5 and Pop2Piano: two-layer or gated FFN, no biases.

Layers are counted through the encoder, then the decoder.

The first layer of the encoder and of the decoder has a table of position biases [buckets, heads]. All layers add its
values to their heads by number, so the heads of a self-attention can't be reordered. Cross-attention has no table.
"""

from torch import nn

from s2ft.model.builders import attention_paths, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("longt5", "mt5", "pop2piano", "t5", "umt5")
SELF_ATTENTIONS = ("SelfAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")


def couplings(model: nn.Module) -> list[Coupling]:
    blocks = [*layers_of(model, "encoder.block"), *layers_of(model, "decoder.block")]
    return [coupling for i, (path, block) in enumerate(blocks) for coupling in _block(model.config, i, path, block)]


def _block(config, i: int, path: str, block: nn.Module) -> list[Coupling]:
    dense = f"{path}.layer.{len(block.layer) - 1}.DenseReluDense"
    name = next(name for name in SELF_ATTENTIONS if hasattr(block.layer[0], name))
    found = [_attention(config, i, f"{path}.layer.0.{name}", kind="attention", fixed=True)]
    if config.is_gated_act:
        ffn = {"up": f"{dense}.wi_1", "gate": f"{dense}.wi_0", "down": f"{dense}.wo"}
        found.append(Coupling.gated_ffn(i, **ffn, channels=config.d_ff))
    else:
        found.append(Coupling.ffn(i, up=f"{dense}.wi", down=f"{dense}.wo", channels=config.d_ff))
    if block.is_decoder:
        found.append(_attention(config, i, f"{path}.layer.1.EncDecAttention", kind="cross-attention"))
    return found


def _attention(config, layer: int, path: str, **more) -> Coupling:
    paths = attention_paths(path, *"qkvo")
    return Coupling.attention(layer, **paths, heads=config.num_heads, head_dim=config.d_kv, **more)
