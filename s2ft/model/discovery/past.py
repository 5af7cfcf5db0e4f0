"""Finds layers whose weight a block may use without running the layer, from the source of the block's class."""

import inspect
import re
from functools import cache

from torch import nn

NOT_IN_FORWARD = ("__init__", "reset_parameters", "_init_weights", "init_weights", "extra_repr")
# What only describes a weight: reading it past the layer does no harm.
DESCRIPTIONS = "dtype|device|shape|size|ndim|dim|numel|is_|requires_grad|element_size"
READS = re.compile(rf"(?<!isinstance\()\bself\.(\w+)\.(?:weight|bias)\b(?!\.(?:{DESCRIPTIONS}))")


def reads_past(owner: nn.Module, name: str) -> bool:
    """Whether a method of the module's class reads the weight of its layer `name`.

    A trainable layer adds its delta in its forward. A block that multiplies by the weight itself, often only where a
    fused kernel is installed, would train or compute without the delta.
    """
    return name in _read_names(type(owner))


@cache
def _read_names(owner: type) -> frozenset[str]:
    found = set()
    for base in owner.__mro__:
        if base.__module__.startswith("torch.nn."):
            continue
        for method, function in vars(base).items():
            if method in NOT_IN_FORWARD or not inspect.isfunction(function):
                continue
            try:
                source = inspect.getsource(inspect.unwrap(function))
            except (OSError, TypeError):  # made without a file
                continue
            found.update(READS.findall(source))
    return frozenset(found)
