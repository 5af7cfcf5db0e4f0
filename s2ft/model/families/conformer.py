"""Conformers (Wav2Vec2-BERT, Wav2Vec2-Conformer, Parakeet): two FFNs, attention and a convolution module in each layer.

Relative positions are projected to each head (linear_pos, relative_k_proj) and have biases of each head: both move with
the heads. So do the depthwise convolution, and the norm after it, with the channels of the convolution module.
"""

from torch import nn

from s2ft.model.builders import attention, ffn, heads_in, layers_of
from s2ft.model.coupling import Coupling, Projection, Vector

WAV2VEC2 = (("intermediate_dense", "output_dense"), ("linear_q", "linear_k", "linear_v", "linear_out"), "linear_pos")
PARAKEET = (("linear1", "linear2"), ("q_proj", "k_proj", "v_proj", "o_proj"), "relative_k_proj")
NAMES = {  # model type → layers of an FFN, layers of the attention, layer of the positions
    "lasr_ctc": PARAKEET,
    "parakeet_ctc": PARAKEET,
    "wav2vec2-bert": WAV2VEC2,
    "wav2vec2-conformer": WAV2VEC2,
}
MODEL_TYPES = tuple(NAMES)
FFNS = ("ffn1", "ffn2", "feed_forward1", "feed_forward2")
CONVOLUTIONS = ("conv_module", "conv")
HEAD_BIASES = ("pos_bias_u", "pos_bias_v", "bias_u", "bias_v")
NORMS = ("batch_norm", "depthwise_layer_norm", "norm")


def couplings(model: nn.Module) -> list[Coupling]:
    (up, down), names, positions = NAMES[model.config.model_type]
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "encoder.layers")):
        found += [
            ffn(model, i, f"{path}.{name}.{up}", f"{path}.{name}.{down}") for name in FFNS if hasattr(layer, name)
        ]
        found.append(_attention(model, i, f"{path}.self_attn", names, positions))
        found += [_convolution(model, i, f"{path}.{name}") for name in CONVOLUTIONS if hasattr(layer, name)]
    return found


def _attention(model: nn.Module, layer: int, path: str, names: tuple[str, ...], positions: str) -> Coupling:
    block = model.get_submodule(path)
    layers = {key: f"{path}.{name}" for key, name in zip("qkvo", names)}
    more = {f"{path}.{positions}": "k"} if hasattr(block, positions) else {}
    moving = {f"{path}.{name}": 1 for name in HEAD_BIASES if hasattr(block, name)}
    return attention(model, layer, **layers, heads=heads_in(model, path), more=more, moving=moving)


def _convolution(model: nn.Module, layer: int, path: str) -> Coupling:
    """Two pointwise convolutions, the first with a gate (GLU), and a depthwise one between them."""
    block = model.get_submodule(path)
    up, down, channels = f"{path}.pointwise_conv1", f"{path}.pointwise_conv2", block.pointwise_conv2.in_channels
    producers = (
        Projection("u", up, channels, 1, 0, size=2 * channels),
        Projection("g", up, channels, 1, 0, start=channels, size=2 * channels),
    )
    between = [name for name in ("depthwise_conv", *NORMS) if hasattr(block, name)]
    tensors = [(name, tensor) for name in between for tensor in ("weight", "bias", "running_mean", "running_var")]
    vectors = tuple(
        Vector(f"{path}.{name}.{tensor}", 1)
        for name, tensor in tensors
        if getattr(block.get_submodule(name), tensor, None) is not None
    )
    return Coupling("convolution", layer, producers, Projection("d", down, channels, 1, 1), vectors)
