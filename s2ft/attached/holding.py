"""Writes base + s2 into the weights of a whole model, before it runs and when an adapter is made active.

A layer that runs writes its own slice if s2 has changed. A hook of the model does it for all layers first: for code
that reads a weight past its layer, and for weights that are spread over ranks, where each rank writes what it owns.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import skip_code

from s2ft.attached import extra_weights
from s2ft.attached.arrival import take_up
from s2ft.attached.record import Attachment, attachment_of
from s2ft.distributed import reshard_all
from s2ft.distributed.fsdp import fsdp_modules
from s2ft.layers.writing import write_all
from s2ft.ops._library import transforms_active


def before_forward(model: nn.Module, *_: Any) -> None:
    """Forward pre-hook of a model with adapters.

    Weights that have arrived are taken up, the base of weights that were unfrozen by hand is recorded, and changed
    slices are written.

    Raises:
        RuntimeError: A weight or bias of a coupling was unfrozen, which would get no gradient, or the weights that have
            arrived are not the base's.
    """
    if torch.compiler.is_compiling() or transforms_active():
        return  # in another function's graph each layer checks what its weight holds; torch.func runs them on copies
    record, hooks = attachment_of(model), model._forward_pre_hooks
    is_first = next(iter(hooks.values())) is before_forward
    if not is_first:  # FSDP2 was applied since
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook is before_forward), last=False)
    is_gathered = not is_first and isinstance(model, fsdp_modules())  # by the hook of FSDP2, which came first
    if take_up(model) and is_gathered:
        model.unshard()  # again
    if model.training and torch.is_grad_enabled() and record.rest is None:  # a proof unfreezes weights for its time
        extra_weights.watch(model, record)
    if not is_gathered:  # else layers compute with copies, this once
        write_slices(model, record)


skip_code(before_forward.__code__)  # a compiled model runs its hooks outside of the graph: this one as it is


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


# ---- without the trainable adapter, in the middle of its training ----------------------------------------------


@contextmanager
def without_trainable(model: nn.Module) -> Iterator[None]:
    """Leave the trainable adapter out of the forward inside the context. Other active adapters stay.

    :func:`s2ft.disable_adapters` writes the base of extra weights into their parameters, and a graph that needs one of
    them can't be used for a backward pass any more. Here other parameters take their places, so no version changes.
    The base is written into the slices, and base + s2 again afterwards. Every rank of a sharded model must call this.

    Args:
        model: Model with an adapter.

    Raises:
        ValueError: The model has no adapters.
    """
    record = attachment_of(model)
    if not record.trains:
        yield
        return
    reshard_all(model)
    with ExitStack() as stack:
        stack.callback(write_slices, model, record)
        for mount in record.mounts.values():
            stack.callback(setattr, mount.layer, "enabled", True)
            mount.layer.enabled = False
            mount.layer.unfuse()
        stack.enter_context(_base_of_extra_weights(model, record))
        yield


@contextmanager
def _base_of_extra_weights(model: nn.Module, record: Attachment) -> Iterator[None]:
    """Put other parameters in the place of the extra weights, with the values from before the training."""
    places = _places(model, record.extra.base)
    try:
        for module, name, _, base in places:
            module._parameters[name] = base
        yield
    finally:
        for module, name, trained, _ in places:
            module._parameters[name] = trained


def _places(model: nn.Module, base: dict[str, Tensor]) -> list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]]:
    """Return each module and name under which an extra weight is registered, its parameter, and one of the base."""
    if not base:
        return []
    known = {id(model.get_parameter(name)): nn.Parameter(value, requires_grad=False) for name, value in base.items()}
    return [
        (module, name, parameter, known[id(parameter)])
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in known
    ]
