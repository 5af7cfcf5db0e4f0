"""Optimizers by name. Their memory is measured after a step on parameters without data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from s2ft.packages import MissingPackages, is_installed

Optimizer = str | Callable[[list[Tensor]], torch.optim.Optimizer]


def _bitsandbytes(name: str, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if not is_installed("bitsandbytes"):
        raise MissingPackages(f"optimizer {name}", ["bitsandbytes"])
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)(parameters)


def _torch(kind: type, parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    # On a GPU PyTorch updates all parameters at once, but only if their types are its own. These are fake tensors.
    return kind(parameters, foreach=True if parameters[0].device.type == "cuda" else None, **options)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adamw": partial(_torch, torch.optim.AdamW),
    "adam": partial(_torch, torch.optim.Adam),
    "adafactor": partial(_torch, torch.optim.Adafactor),
    "sgd": partial(_torch, torch.optim.SGD, lr=1e-3),
    "sgd-momentum": partial(_torch, torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adamw-8bit": partial(_bitsandbytes, "AdamW8bit"),
    "paged-adamw-8bit": partial(_bitsandbytes, "PagedAdamW8bit"),
}


def maker(optimizer: Optimizer) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Return the function that makes the optimizer from a list of parameters.

    Raises:
        ValueError: The name is unknown.
        TypeError: `optimizer` is neither a name nor a class or function.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, or a class or function that makes "
                f"one, got {optimizer!r}"
            )
        return OPTIMIZERS[optimizer]
    if not callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a name, or a class or function that makes a torch.optim.Optimizer from a list "
            f"of parameters, got {type(optimizer).__name__}"
        )
    return optimizer
