"""Writes base + s2 into the weights of a whole model, before it runs and when an adapter is made active.

A layer that runs writes its own slice if s2 has changed. A hook of the model does it for all layers first: for code
that reads a weight past its layer, and for weights that are spread over ranks, where each rank writes what it owns.
"""

from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from s2ft.attached.hosts.checkpointing import remove_hooks
from s2ft.attached.record import Attachment, find_attachment
from s2ft.distributed import reshard_all
from s2ft.layers.writing import write_all
from s2ft.ops._library import transforms_active
from s2ft.ranks.fsdp import fsdp_modules


def start_holding(model: nn.Module) -> None:
    """Register the hook that writes changed slices before the model runs."""
    stop_holding(model)
    model.register_forward_pre_hook(_before_forward, prepend=True)


def stop_holding(model: nn.Module) -> None:
    """Remove the hook, if it is registered."""
    remove_hooks(model._forward_pre_hooks, lambda hook: hook is _before_forward)


def _before_forward(model: nn.Module, *_: Any) -> None:
    if torch.compiler.is_compiling() or transforms_active():
        return  # in another function's graph each layer checks what its weight holds; torch.func runs them on copies
    record, hooks = find_attachment(model), model._forward_pre_hooks
    if next(iter(hooks.values())) is not _before_forward:  # FSDP2 was applied since
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook is _before_forward), last=False)
        if isinstance(model, fsdp_modules()):
            return  # it has gathered weights by now: this once, layers compute with copies of them
    if record is not None:
        write_slices(model, record)


skip_code(_before_forward.__code__)  # a compiled model runs its hooks outside of the graph: this one as it is


@torch.compiler.disable
def write_slices(model: nn.Module, record: Attachment) -> None:
    """Write base + s2 into every weight that holds other values of s2. Every rank of a sharded model must call this.

    Args:
        model: A model, outside of its forward.
        record: Its record.
    """
    if record.awaits_weights or not record.trains:
        return
    layers = [mount.layer for mount in record.mounts.values()]
    layers = [layer for layer in layers if layer.enabled and layer.kind.read_only is None]
    # Code that writes into `s2.data` changes no version. So a model that may train is written always, which takes less
    # than 1 % of its step. What is spread over ranks has to be gathered for that.
    trains = torch.is_grad_enabled()
    changed = [layer for layer in layers if not layer.is_written or trains and not layer.is_managed]
    if changed:
        reshard_all(model)
        write_all(changed)
