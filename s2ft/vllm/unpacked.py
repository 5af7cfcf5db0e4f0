"""Weights that slices can be written into, on vLLM's CPU backend.

This backend packs the weight of each linear layer into a form of its own (oneDNN, AMX, ZenDNN) and forgets the
original, so that nothing can be written into it. An engine with the weight transfer backend ``s2ft`` keeps its
weights as they are and multiplies by them with `torch.nn.functional.linear`. Engines without that backend are not
changed.
"""

from typing import Any

import torch

from s2ft.vllm.compatibility import private, when_imported

FEATURE = "weights that slices can be written into"
BACKEND = "s2ft"
_UTILS = "vllm.model_executor.layers.utils"
_DONE = "_s2ft_unpacked"  # the mark of a function that this module has replaced


def install() -> None:
    """Let engines with the weight transfer backend ``s2ft`` leave the weights of linear layers unpacked."""
    when_imported(_UTILS, FEATURE, _change)


def _change() -> None:
    utils = private(_UTILS)
    pack = private(_UTILS, "dispatch_cpu_unquantized_gemm")
    config = private("vllm.config", "get_current_vllm_config_or_none")
    if getattr(pack, _DONE, False):
        return

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, *args: Any, **options: Any) -> None:
        if layer.weight.dim() == 2 and is_chosen(config()):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, *args, **options)

    setattr(dispatch_cpu_unquantized_gemm, _DONE, True)
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def is_chosen(config: Any) -> bool:
    """Whether an engine's configuration has the weight transfer backend ``s2ft``."""
    return getattr(getattr(config, "weight_transfer_config", None), "backend", None) == BACKEND


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a layer of the CPU backend computes with a packed copy of its weight."""
    return getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear
