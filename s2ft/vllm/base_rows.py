"""Answers of the base that share a batch with adapters, on processors.

vLLM marks a token of the base by the slot -1. Its kernels for processors take that as the last slot, so that an answer
of the base contains the adapter that lies there, if one does. Kernels for GPUs leave these tokens out.
"""

import functools
from typing import Any

from s2ft.vllm.compatibility import private, when_imported

FEATURE = "answers of the base beside adapters on processors"
MODULE = "vllm.lora.punica_wrapper.punica_cpu"
SHRINK = ("_shrink_prefill", "_shrink_decode")


def install() -> None:
    """Let the first product of a LoRA be zero for tokens of the base. The second one then adds nothing.

    Raises:
        MissingInVLLM: This release of vLLM has no such module.
    """
    when_imported(MODULE, FEATURE, _change)


def _change() -> None:
    wrapper = private(MODULE, "PunicaWrapperCPU")
    for name in SHRINK:
        setattr(wrapper, name, _without_base(private(MODULE, f"PunicaWrapperCPU.{name}")))


def _without_base(shrink: Any) -> Any:
    @functools.wraps(shrink)
    def shrink_adapters(self: Any, y: Any, *args: Any, **options: Any) -> None:
        shrink(self, y, *args, **options)
        of_base = self.token_lora_indices[: y.shape[0]] < 0
        y[: of_base.numel()][of_base] = 0

    return shrink_adapters
