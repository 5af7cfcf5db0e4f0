"""Attached models whose adapter changes the output."""

import torch
from torch import nn

from s2ft.attached.record import attachment_of


def random_slices(model: nn.Module) -> nn.Module:
    """Give all trained slices random values, the same each time. Returns the model."""
    generator = torch.Generator().manual_seed(3)
    for mount in attachment_of(model).mounts.values():
        mount.layer.s2.data.normal_(std=0.02, generator=generator)
    return model


def without_caches(model: nn.Module) -> nn.Module:
    """Turn off the caches of keys and values. Returns the model."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model
