"""When the weights of trainable layers get base + s2: all slices of a model in one pass of one op for each device.

An optimizer's step changes s2, and the slices are written right after it. A layer also writes its own before it runs,
if s2 has changed since.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from s2ft.ops import write_slices_
from s2ft.ops._library import LIBRARY
from s2ft.ops._memory import WRITING

_holding: "WeakValueDictionary[int, Any]" = WeakValueDictionary()  # layers by the address of their s2's storage


def write_all(layers: Sequence[Any]) -> None:
    """Write base + s2 into the weights of some layers, or into what this process owns of them.

    After an interrupt at any moment, a layer either knows that its weight holds the present values or writes it again.

    Args:
        layers: Layers (S2Layer) that are on. Every rank that has a part of an s2 must name the same ones.

    Raises:
        RuntimeError: A weight has been replaced while it held base + s2.
        ValueError: A weight is in read-only memory, or in memory that other processes have too.
    """
    with WRITING, torch.inference_mode(False):  # tensors that are made in inference mode can't be changed later
        begun = [layer.begin_write() for layer in layers]
        write_slices_([one for _, slices in begun for one in slices])
        for layer, (stamps, _) in zip(layers, begun):
            layer.end_write(stamps)
        for device in {layer.weight.device for layer in layers}:
            note_written(device)


def stamp(tensor: Tensor) -> tuple[int, Any]:
    """Tell the present values of a slice, or of a weight, from earlier ones. It keeps no memory alive.

    It changes with every change in place that PyTorch counts, and with another memory. It does not change when other
    code writes into ``s2.data``. Steps of optimizers, some of which write in this way, are noted apart.
    """
    return tensor._version, ref(tensor.untyped_storage())


def watch(layer: Any, s2: Tensor) -> None:
    """Write a layer again after a step of an optimizer that has its s2.

    Args:
        layer: The layer (S2Layer).
        s2: What this process has of its s2.
    """
    if not _OptimizerSteps.is_watched:
        _OptimizerSteps.is_watched = True
        register_optimizer_step_post_hook(_OptimizerSteps.note)
    _holding[s2.untyped_storage()._cdata] = layer


def note_written(device: torch.device) -> None:
    """Remember that weights on a device have been written, so that other streams wait for it."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device)
        _last_writes[stream.device_index] = stream, stream.record_event()


# By device: the stream of the last write of a slice, and an event after it.
_last_writes: dict[int, tuple[torch.cuda.Stream, torch.cuda.Event]] = {}


def wait_for_write(weight: Tensor) -> None:
    """Let the present stream wait for the last write, if another stream has done it. The host does not wait.

    A pipeline runs a layer for the first part of a batch on one stream, where the slice is written, and for the next
    part on another. A stream that is being captured can't wait for work outside the graph.
    """
    if not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(weight.device)
        last = _last_writes.get(stream.device_index)
        if last is not None and last[0] != stream:
            stream.wait_event(last[1])


class _OptimizerSteps:
    """Writes the slices that an optimizer has changed, so that whoever reads a weight finds base + s2 after the step.

    An optimizer may change s2 without PyTorch counting it. What an engine manages has its new values later, so that it
    is written before the next forward.
    """

    is_watched = False

    @staticmethod
    @torch.compiler.disable
    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = {id(one) for group in optimizer.param_groups for one in group["params"]}
        changed = [layer for layer in set(_holding.values()) if layer.fused]
        changed = [layer for layer in changed if id(layer.s2) in stepped or layer.is_managed]
        changed = [layer for layer in changed if layer.after_step()]
        write_all(changed)
        for layer in changed:
            layer.expect_change()


def _check_held(s2: Tensor, trains: bool) -> None:
    layer = _holding.get(s2.untyped_storage()._cdata)
    if layer is None or not layer.holds(stamp(s2)):
        raise RuntimeError(
            "a compiled graph multiplies by a weight that does not hold the present values of s2: they have changed "
            "since, or the adapter is off. Call the model that has the adapter, and not a part of it, or layer.fuse() "
            "before"
        )
    if trains:
        layer.expect_change()


LIBRARY.define("check_held(Tensor s2, bool trains) -> ()")
LIBRARY.impl("check_held", _check_held, "CompositeExplicitAutograd")
torch.library.register_fake("s2ft::check_held", lambda s2, trains: None, lib=LIBRARY)
torch.fx.node.has_side_effect(torch.ops.s2ft.check_held.default)
