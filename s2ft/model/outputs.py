"""The tensors in what a model returns."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_in(output: Any, name: str = "") -> Iterator[Tensor]:
    """Iterate over the floating-point tensors of a model's output.

    Attention weights and caches are left out, because heads that are reordered change them.
    """
    if "attentions" in name or "cache" in name or "past" in name:
        return
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors_in(value, str(key))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value, name)
