"""Whisper and translators of the same structure: two-layer FFN, separate q, k and v.

Layers are counted through the encoder, then the decoder.

Positions are tables that are added to the embeddings. The convolutions before the encoder are not part of a coupling.
"""

from collections.abc import Iterator

from torch import nn

from s2ft.model.builders import attention_paths, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("fsmt", "m2m_100", "pegasus_x", "speech_to_text", "whisper")
SINCE = {"fsmt": "5.18"}  # before, its decoder sees the first token only


def couplings(model: nn.Module) -> list[Coupling]:
    config = model.config
    encoder, decoder = list(layers_of(model, "encoder.layers")), list(layers_of(model, "decoder.layers"))
    found = []
    for i, (path, _) in enumerate(encoder):
        found += _layer(config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim, i, path)
    for i, (path, _) in enumerate(decoder, len(encoder)):
        found += _layer(config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, i, path)
        found.append(
            _attention(config.d_model, config.decoder_attention_heads, i, f"{path}.encoder_attn", "cross-attention")
        )
    return found


def _layer(width: int, heads: int, channels: int, i: int, path: str) -> Iterator[Coupling]:
    yield Coupling.ffn(i, up=f"{path}.fc1", down=f"{path}.fc2", channels=channels)
    yield _attention(width, heads, i, f"{path}.self_attn", "attention")


def _attention(width: int, heads: int, layer: int, path: str, kind: str) -> Coupling:
    paths = attention_paths(path, o="out_proj")
    return Coupling.attention(layer, **paths, heads=heads, head_dim=width // heads, kind=kind)
