"""Between a model and adapter folders."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter, check_fits, model_info
from s2ft.adapter.formats import native
from s2ft.adapter.hub import resolve
from s2ft.adapter.switch import check_free, get_adapter, set_adapter
from s2ft.api import adapters_aside, new_attachment
from s2ft.attached import extra
from s2ft.attached.active import check_can_write, set_mounted_deltas, take_off
from s2ft.attached.hosts.compiled import of_compiled
from s2ft.attached.mounting import check_memory, claim, mount, release
from s2ft.attached.record import RECORD, Attachment, attachment_of
from s2ft.distributed import full_tensors, ranks_sharing, reshard_all, run_on_first_rank
from s2ft.files.formats import read_adapter_folder
from s2ft.files.reading import check_adapter_name


@of_compiled
def save_adapter(
    model: nn.Module,
    directory,
    name: str | None = None,
    info: dict[str, Any] | None = None,
    *,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Save one adapter of `model` as safetensors and s2ft_config.json, in original coordinates.

    Args:
        directory: made if need be; an adapter in it is replaced.
        name: which adapter; default: the trainable one, or the only one loaded.
        info: JSON values to keep with it, e.g. the base model's name.
        state: a state_dict gathered by others (accelerate, Trainer) that has the trainable layers' s2, instead of the
            model's own.

    What is trained of a sharded model (FSDP2, or by ZeRO's optimizers) is gathered: every rank must call this, the
    first writes, and the others return when the files stand. Of any other model each rank that calls this writes.

    Raises: ValueError for an unknown name or a delta that is empty or not finite, nothing written; RuntimeError where
    another rank failed to write, or does not come to gather within ten minutes.
    """
    record = attachment_of(model)
    if name is None:
        name = record.name if record.name is not None else next(iter(record.active), record.names[0])
    adapter = get_adapter(model, name, state)
    adapter.info = {**model_info(model), **adapter.info, **(info or {})}
    ranks = ranks_sharing(_trained(model, record).values()) if name == record.name and state is None else None
    run_on_first_rank("saving an adapter", ranks, lambda: native.write(adapter, directory))


@of_compiled
def gathered(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, all of it, by its name in the model, for `state` of :func:`save_adapter`.

    Of a sharded model every rank must call this. Raises: RuntimeError where one does not come within ten minutes.
    """
    reshard_all(model)
    return full_tensors(_trained(model, attachment_of(model)))


def _trained(model: nn.Module, record: Attachment) -> dict[str, Tensor]:
    return {**record.slices, **extra.trained_parameters(model, record)}


def read_adapter(adapter: str | os.PathLike) -> Adapter:
    """An adapter's files, checked, from a folder, or from a repository on the hub, "org/name" or "org/name@revision".

    Raises: FileNotFoundError, or ValueError that names what is wrong with the files.
    """
    return read_adapter_folder(resolve(adapter))


@of_compiled
def load_adapter(
    model: nn.Module,
    adapter: str | os.PathLike | Adapter,
    name: str | None = None,
    trainable: bool = False,
    *,
    active: bool = True,
    device=None,
) -> None:
    """Load a saved adapter under `name` (default: the name it was saved with) and make it the active one.

    On a model without adapters this attaches first, by the couplings in the adapter where they were given by
    hand. With ``trainable=False`` the deltas are written into the weights (the base they replace is kept), all
    parameters are frozen, and the adapter can be switched off or exchanged for another. With ``trainable=True``
    the layers, the selection and the layout it was trained with are set up again, so that training can go on;
    one adapter a model can be, besides others that are loaded.

    Args:
        adapter: a folder, a repository on the hub ("org/name"), or an :class:`Adapter` as :func:`get_adapter` and
            arithmetic give it.
        active: False leaves what is active as it is; a trainable one is always active.
        device: where the deltas are kept; default: the CPU. On the model's device switching is fastest.
    Raises: FileNotFoundError or ValueError that names what is wrong (another base, a missing or
    foreign key, a shape, an index out of range); the model is then as it was.
    """
    adapter = replace(adapter) if isinstance(adapter, Adapter) else read_adapter(adapter)
    adapter.name = adapter.name if name is None else name
    check_adapter_name(adapter.name)
    fresh = RECORD not in model.__dict__
    record = new_attachment(model, adapter.couplings) if fresh else attachment_of(model)
    check_fits(adapter, model, record)
    check_free(record, adapter.name)
    if trainable:
        if record.name is not None:
            raise ValueError(f"{record.name!r} is trainable, and only one adapter can be: detach or delete it first")
        with adapters_aside(model, record):
            mount(model, record, adapter.config, adapter.selection, adapter.name)
            set_mounted_deltas(record, adapter.deltas)
            extra.unfreeze(model, record, adapter.extra_weights)
            extra.set_trained(model, record, adapter.extra_weights)
        return
    check_can_write(model, record, adapter.deltas)
    check_memory(model, [record.projections[path] for path in adapter.deltas])
    try:
        if fresh:
            claim(model, record)
            model.requires_grad_(False)
        record.others[adapter.name] = adapter if device is None else adapter.to(device)
        if active:
            set_adapter(model, adapter.name)
    except BaseException:
        take_off(model, record)
        if fresh:
            release(model, record)
        else:
            record.others.pop(adapter.name, None)
        raise


@of_compiled
def restore_adapter(model: nn.Module, directory) -> None:
    """Copy a saved adapter's deltas into the trainable layers of `model`: how a run is resumed.

    Raises: ValueError when the saved selection is not the attached one, or as :func:`load_adapter`.
    """
    record: Attachment = attachment_of(model)
    adapter = read_adapter(directory)
    check_fits(adapter, model, record)
    if record.selection is None or adapter.selection != record.selection:
        raise ValueError(f"{directory} holds another selection than the one this model trains")
    extra.check_same(model, record, adapter.extra_weights)
    reshard_all(model)
    set_mounted_deltas(record, adapter.deltas)
    extra.set_trained(model, record, adapter.extra_weights)
