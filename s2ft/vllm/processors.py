"""vLLM's CPU backend: answers of the base beside adapters, and weights that slices can be written into.

vLLM marks a token of the base by the slot -1. Its kernels for processors take that as the last slot, so that an answer
of the base contains the adapter that lies there, if one does. Kernels for GPUs leave these tokens out.

This backend packs the weight of each linear layer into a form of its own (oneDNN, AMX, ZenDNN) and forgets the
original, so that nothing can be written into it. An engine with the weight transfer backend ``s2ft`` keeps its weights
as they are and multiplies by them with `torch.nn.functional.linear`. Engines without that backend are not changed.
"""

import functools
from typing import Any

import torch

from s2ft.vllm.compatibility import private, when_imported

FEATURE = "the base beside adapters, and weights that slices can be written into, on processors"
BACKEND = "s2ft"
PUNICA, UTILS = "vllm.lora.punica_wrapper.punica_cpu", "vllm.model_executor.layers.utils"


def install() -> None:
    """Change the CPU backend.

    Raises:
        MissingInVLLM: This release of vLLM lacks a module that is changed.
    """
    when_imported(UTILS, FEATURE, _leave_unpacked)
    when_imported(PUNICA, FEATURE, _leave_base_out)


def _leave_base_out() -> None:
    """Let the first product of a LoRA be zero for tokens of the base. The second one then adds nothing."""
    wrapper = private(PUNICA, "PunicaWrapperCPU")
    for name in ("_shrink_prefill", "_shrink_decode"):
        setattr(wrapper, name, _without_base(private(PUNICA, f"PunicaWrapperCPU.{name}")))


def _without_base(shrink: Any) -> Any:
    @functools.wraps(shrink)
    def shrink_adapters(self: Any, y: Any, *args: Any, **options: Any) -> None:
        shrink(self, y, *args, **options)
        of_base = self.token_lora_indices[: y.shape[0]] < 0
        y[: of_base.numel()][of_base] = 0

    return shrink_adapters


def _leave_unpacked() -> None:
    utils = private(UTILS)
    pack = private(UTILS, "dispatch_cpu_unquantized_gemm")
    config = private("vllm.config", "get_current_vllm_config_or_none")

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, *args: Any, **options: Any) -> None:
        if layer.weight.dim() == 2 and is_chosen(config()):
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, *args, **options)

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def is_chosen(config: Any) -> bool:
    """Whether an engine's configuration has the weight transfer backend ``s2ft``."""
    return getattr(getattr(config, "weight_transfer_config", None), "backend", None) == BACKEND


def is_packed(module: torch.nn.Module) -> bool:
    """Whether a layer of the CPU backend computes with a packed copy of its weight."""
    return getattr(module, "cpu_linear", torch.nn.functional.linear) is not torch.nn.functional.linear
