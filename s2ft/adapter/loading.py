"""From adapter folders to a model."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from s2ft.adapter.adapter import Adapter, check_fits, model_info
from s2ft.adapter.formats import lora
from s2ft.adapter.hub import resolve
from s2ft.adapter.pretrained import HOST_HOOKS
from s2ft.attached import extra_weights
from s2ft.attached.active import set_mounted_deltas
from s2ft.attached.changes import adapters_off, load
from s2ft.attached.checks import check_can_write, check_memory, check_new_name
from s2ft.attached.hosts.wrappers import of_compiled
from s2ft.attached.mounting import mount, touched
from s2ft.attached.proof import proved
from s2ft.attached.record import attachment_of, find_attachment, new_attachment
from s2ft.distributed import reshard_all
from s2ft.files.formats import read_adapter_folder
from s2ft.model.coupling import Coupling
from s2ft.model.location import structure_of


def read_adapter(adapter: str | os.PathLike) -> Adapter:
    """Read and check the files of an adapter.

    Args:
        adapter: Adapter folder, output folder of `s2ft sft`, or a repository on the hub, "org/name" or
            "org/name@revision".

    Returns:
        The adapter, with its tensors on the CPU.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: A file is damaged or is not of an adapter. The message names what is wrong.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.save_adapter(model, "math")
        >>> s2ft.read_adapter("math").name
        'math'
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
    device: torch.device | str | None = None,
    verify: bool | None = None,
    example: Any = None,
) -> None:
    """Load an adapter into a model and make it the active one.

    With ``trainable=False`` the deltas are written into the weights, and the base values that they replace are kept:
    the adapter can be switched off or exchanged for another. All parameters are frozen. With ``trainable=True`` the
    layers, the selection and the layout of its training are set up again, so that training can go on. A model can have
    one trainable adapter and any number of others.

    A model without adapters needs no :func:`s2ft.attach` before. Couplings that were given to `attach` are in the
    adapter.

    Args:
        model: Base model of the adapter, with or without adapters.
        adapter: Folder or hub repository as in :func:`read_adapter`, or an :class:`Adapter`, such as
            :func:`get_adapter` and arithmetic return.
        name: Name of the loaded adapter. Default: the name that it was saved with.
        trainable: Whether its training goes on.
        active: Whether it becomes the active adapter. A trainable adapter always does.
        device: Device that keeps the tensors of an adapter that is not trainable, such as "cpu" for more adapters than
            fit on a GPU; each switch then sends them there. Default: the devices of the model's weights. They follow
            the model when it moves, and a switch waits for nothing.
        verify: As for :func:`s2ft.attach`, for a trainable adapter.
        example: As for :func:`s2ft.attach`. Nothing but `verify` uses it.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: The files are damaged, the adapter is of another base, the name is taken, or the model has a
            trainable adapter already. The model is then unchanged.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.save_adapter(model, "math")
        >>> s2ft.load_adapter(s2ft.detach(model), "math")
        >>> s2ft.list_adapters(model)
        ['math']
    """
    adapter = replace(adapter) if isinstance(adapter, Adapter) else read_adapter(adapter)
    adapter.name = adapter.name if name is None else name
    record = find_attachment(model)
    check_new_name(record, adapter.name)
    if record is None:
        record = new_attachment(model, adapter.couplings, HOST_HOOKS)
    check_fits(adapter, model, record)
    record.expect_base(adapter.fingerprint)
    adapter.structure = adapter.structure or structure_of(model, record.couplings, adapter.deltas)
    if not trainable:
        check_can_write(model, record, adapter.deltas)
        check_memory(model, [record.projections[path] for path in adapter.deltas])
        if device is not None:
            adapter = replace(adapter.to(device), device=torch.device(device))
        load(model, record, adapter, active)
        return
    if record.name is not None:
        raise ValueError(f"{record.name!r} is trainable, and only one adapter can be: detach or delete it first")
    trained = touched(record.couplings, adapter.selection)
    with adapters_off(model, record):
        with proved(model, record, trained, adapter.config, adapter.selection, verify, example):
            mount(model, record, adapter.config, adapter.selection, adapter.name)
        set_mounted_deltas(record, adapter.deltas)
        extra_weights.unfreeze(model, record, adapter.extra_weights)
        extra_weights.set_trained(model, record, adapter.extra_weights)
        of_the_base = model_info(model)  # saving writes these values again
        record.add_info({key: value for key, value in adapter.info.items() if key not in of_the_base})


@of_compiled
def restore_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Copy a saved adapter's deltas into the trainable layers of a model, to resume its training.

    Args:
        model: Model with a trainable adapter of the same selection.
        directory: Folder or hub repository as in :func:`read_adapter`.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: The adapter has another selection or another base than the model, or its files are damaged.

    Example:
        >>> from s2ft.adapter import restore_adapter
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.save_adapter(model, "checkpoint")
        >>> restore_adapter(model, "checkpoint")
    """
    record = attachment_of(model)
    adapter = read_adapter(directory)
    check_fits(adapter, model, record)
    if record.selection is None or adapter.selection != record.selection:
        raise ValueError(f"{directory} holds another selection than the one this model trains")
    extra_weights.check_same(model, record, adapter.extra_weights)
    reshard_all(model)
    set_mounted_deltas(record, adapter.deltas)
    extra_weights.set_trained(model, record, adapter.extra_weights)


@of_compiled
def import_lora(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    *,
    couplings: Sequence[Coupling] | None = None,
) -> None:
    """Load a LoRA that has the structure of S²FT as an adapter, and make it active.

    Every rank of the LoRA must be one-hot on the side that S²FT trains, as in a folder that :func:`export_lora` wrote.

    Args:
        model: The LoRA's base model, with or without adapters.
        directory: The LoRA's folder.
        name: The name of the new adapter.
        couplings: The couplings of a model of no known family.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The LoRA has another structure or another base, or the name is taken. The model has not changed.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.export_lora(model, "lora")
        >>> base = s2ft.detach(model)
        >>> s2ft.import_lora(base, "lora", "math")
        >>> s2ft.list_adapters(base)
        ['math']
    """
    load_adapter(model, lora.read(directory, model, name, couplings))
