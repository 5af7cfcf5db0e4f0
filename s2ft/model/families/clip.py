"""CLIP, SigLIP and MetaCLIP 2: two towers of the same structure, or one. Layers are counted through the text first.

SigLIP's pooling head is not trained: PyTorch's own attention reads its weights past the layers.
"""

from torch import nn

from s2ft.model.builders import attention_paths, head_sizes, layers_of
from s2ft.model.coupling import Coupling

MODEL_TYPES = ("clip", "clip_text_model", "clip_vision_model", "metaclip_2", "siglip", "tipsv2_text_model")


def couplings(model: nn.Module) -> list[Coupling]:
    if not hasattr(model.config, "text_config"):
        return _tower(model, "encoder.layers", model.config, 0)
    text = _tower(model, "text_model.encoder.layers", model.config.text_config, 0)
    depth = len({coupling.layer for coupling in text})  # 0 where the model has the vision tower only
    return text + _tower(model, "vision_model.encoder.layers", model.config.vision_config, depth)


def _tower(model: nn.Module, stack: str, config, first: int) -> list[Coupling]:
    heads, _, head_dim = head_sizes(config)
    found = []
    for i, (path, _) in enumerate(layers_of(model, stack), first):
        ffn = {"up": f"{path}.mlp.fc1", "down": f"{path}.mlp.fc2"}
        found.append(Coupling.ffn(i, **ffn, channels=config.intermediate_size))
        attention = attention_paths(f"{path}.self_attn", o="out_proj")
        found.append(Coupling.attention(i, **attention, heads=heads, head_dim=head_dim))
    return found
