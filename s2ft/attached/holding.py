"""Models whose weights hold base + s2 from one optimizer step to the next (`effective="step"`).

A pre-hook of the model's forward writes all slices that have changed, in one go under the lock of weights. So another
thread that reads inside :func:`s2ft.stable_weights` sees base + s2 of one step in all layers. A layer that runs outside
of the model's forward writes its own slice.
"""

from typing import Any

import torch
from torch import nn

from s2ft.attached.checks import check_can_fuse
from s2ft.attached.hosts.checkpointing import remove_hooks
from s2ft.attached.record import Attachment, find_attachment
from s2ft.distributed import has_master_copy, will_be_loaded_again
from s2ft.layers.base import CALL_INSTEAD
from s2ft.layers.held import WHY_UNCOMPILED
from s2ft.model.coupling import Projection
from s2ft.model.weights import weight_at
from s2ft.ops._lock import LOCK
from s2ft.ranks.fsdp import managed_by_fsdp


def check_can_hold(model: nn.Module, projections: list[Projection]) -> None:
    """Check that weights can hold base + s2 from step to step. Nothing has changed yet.

    Args:
        model: The model.
        projections: The projections that would be trained.

    Raises:
        ValueError: One of them can't. The message names it and the reason.
    """
    refused = "effective='step' is not possible: {}. " + CALL_INSTEAD[0].upper() + CALL_INSTEAD[1:]
    if will_be_loaded_again() or any(map(has_master_copy, model.parameters())):
        raise ValueError(refused.format("FSDP2 or DeepSpeed will keep the model's weights"))
    try:
        check_can_fuse(model)
    except ValueError as error:
        raise ValueError(refused.format("the model's weights are spread over ranks")) from error
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for projection in projections:
        handle = weight_at(model, projection)
        if handle.kind.why_not_held:
            raise ValueError(refused.format(f"{projection.path} is {handle.kind.name}: {handle.kind.why_not_held}"))
        names = owners.get(id(handle.tensor), [])
        if len(names) > 1:
            raise ValueError(
                refused.format(f"{' and '.join(names)} are one tied weight, and the others would compute with s2 too")
            )


def start_holding(model: nn.Module, record: Attachment) -> None:
    """Register the hook that writes changed slices before the model runs, if the trainable adapter asks for it."""
    stop_holding(model)
    if record.config is not None and record.config.effective == "step":
        model.register_forward_pre_hook(write_changed_slices)


def stop_holding(model: nn.Module) -> None:
    """Remove the hook, if it is registered."""
    remove_hooks(model._forward_pre_hooks, lambda hook: hook is write_changed_slices)


@torch.compiler.disable(reason=WHY_UNCOMPILED)
def write_changed_slices(model: nn.Module, *_: Any) -> None:
    """Write base + s2 into every weight that holds other values of s2.

    Raises:
        RuntimeError: FSDP2 has sharded the model since the adapter was attached.
    """
    record = find_attachment(model)
    if record is None or record.awaits_weights:
        return
    if managed_by_fsdp(model):
        raise RuntimeError(
            f"effective='step' writes base + s2 into whole weights, and FSDP2 has sharded this model: {CALL_INSTEAD}"
        )
    layers = [mount.layer for mount in record.mounts.values() if mount.layer.enabled and not mount.layer.is_held]
    if not layers:
        return
    with LOCK:
        for layer in layers:
            layer.hold()
