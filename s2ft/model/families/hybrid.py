"""Decoders whose layers differ: attention in some, linear attention, a state space or a convolution in others.

Each part of a layer has its own coupling, by the name of its module. An FFN may be a mixture. The attention of
Qwen3-Next and Qwen3.5 computes a gate of its output beside each query head, in the same layer, so that a head of q is
twice as wide as one of o. See recurrent.py for what takes the place of attention.
"""

from collections.abc import Callable

from torch import nn

from s2ft.model.builders import layers_of
from s2ft.model.coupling import Coupling
from s2ft.model.families.deepseek import latent_attention
from s2ft.model.families.mixtral import dense, mixture, self_attention
from s2ft.model.families.recurrent import (
    delta_attention,
    delta_net,
    jamba_mamba,
    lightning_attention,
    mamba,
    rg_lru,
    short_convolution,
)

MODEL_TYPES = (
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "jamba",
    "kimi_linear",
    "lara_mini",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "mamba",
    "mamba2",
    "minimax",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
)
SINCE = {
    "granitemoe": "5.14",
    "granitemoehybrid": "5.14",
    "granitemoeshared": "5.14",
    "olmo_hybrid": "5.15",
    "recurrent_gemma": "5.14",
}
Part = Callable[[nn.Module, int, str], list[Coupling]]


def couplings(model: nn.Module) -> list[Coupling]:
    found = []
    for i, (path, layer) in enumerate(layers_of(model, "layers")):
        for name, describe in PARTS.items():
            if getattr(layer, name, None) is not None:
                found += describe(model, i, f"{path}.{name}")
    return found


def _shared(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    """GraniteMoE's shared expert is beside the mixture, not in it."""
    return [dense(model, layer, path, kind="shared-expert")]


def _attention(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    block = model.get_submodule(path)
    if hasattr(block, "output_gate"):
        return lightning_attention(model, layer, path)
    if hasattr(block, "forget_gate"):
        return delta_attention(model, layer, path)
    if hasattr(block, "kv_b_proj"):
        return [latent_attention(model, layer, path)]
    return [self_attention(model, layer, path)]


def _mamba(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    return (jamba_mamba if model.config.model_type == "jamba" else mamba)(model, layer, path)


def _temporal(model: nn.Module, layer: int, path: str) -> list[Coupling]:
    return (rg_lru if hasattr(model.get_submodule(path), "rg_lru") else _attention)(model, layer, path)


# name of a module of a layer → its couplings
PARTS: dict[str, Part] = {
    "mlp": mixture,
    "mlp_block": mixture,
    "feed_forward": mixture,
    "block_sparse_moe": mixture,
    "shared_mlp": _shared,
    "self_attn": _attention,
    "temporal_block": _temporal,
    "linear_attn": delta_net,
    "mamba": _mamba,
    "mixer": mamba,
    "conv": short_convolution,
}
