"""The adapters of a model: loaded, switched, combined, renamed and removed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter, Overlap, check_weight, overlap, weighted_sum
from s2ft.adapter.formats import ADAPTER_FORMATS
from s2ft.attached.active import (
    all_or_nothing,
    check_can_put_on_extra,
    coded_deltas,
    deactivate,
    place_loaded,
    set_extra,
    set_mounted_deltas,
    set_trained,
    switch,
    unfreeze,
)
from s2ft.attached.hooks import add_record_and_hooks
from s2ft.attached.mounting import end_training, make_plain, remove_all, starting_from_base
from s2ft.attached.proof import mount_proved
from s2ft.attached.record import (
    Record,
    check_fits,
    check_known,
    check_new_name,
    check_plain_and_untied,
    check_sentence_model,
    find_record,
    new_record,
    on_unwrapped,
    record_of,
    unwrapped,
)
from s2ft.attached.report import Report, status
from s2ft.attached.saving import get_adapter, model_info
from s2ft.config import refuse
from s2ft.distributed import check_not_in_engine
from s2ft.files.reading import has_adapter, local_folder
from s2ft.model.fingerprint import structure_of
from s2ft.model.weights import check_own_memory, weight_at

# ---- loading --------------------------------------------------------------------------------------------------------


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
    folder = local_folder(adapter)
    others = () if has_adapter(folder) else (one.module for one in ADAPTER_FORMATS.values())
    return next((one for one in others if one.matches(folder)), native).read(folder)


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
) -> Report:
    """Load an adapter into a model and make it the active one.

    With ``trainable=False`` the deltas are written into the weights, and the base values that they replace are kept:
    the adapter can be switched off or exchanged for another. A model without adapters is frozen. With
    ``trainable=True`` the layers, the selection and the layout of its training are set up again, so that training can
    go on, and other adapters are switched off: after loading one that was trained on top of others, make those active
    by :func:`s2ft.set_adapter`. A model can have one trainable adapter and any number of others.

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

    Returns:
        A report of what the adapter trains or has trained. It prints as a table.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: The files are damaged, the adapter is of another base, the name is taken, or the model has a
            trainable adapter already. The model is then unchanged.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.save_adapter(model, "math")
        >>> print(s2ft.load_adapter(s2ft.detach(model), "math"))
        projection     layers  units per layer     parameters  dtype
        mlp.down_proj       2  13 of 128 channels       1,664  float32
        adapter 'math', layout permuted: 1,664 of 86,336 parameters were trained, and are frozen now (1.93%)
    """
    if trainable:
        check_sentence_model(model)
    model = unwrapped(model)
    # a copy: it is changed below
    adapter = replace(adapter if isinstance(adapter, Adapter) else read_adapter(adapter), device=None)
    adapter.name = adapter.name if name is None else name
    record = find_record(model)
    check_new_name(record, adapter.name)
    trained = None if record is None else record.trainable
    refuse(
        (
            trainable and device is not None,
            "device is for an adapter that is not trainable: a trainable one is where the weights are",
        ),
        (
            trainable and trained is not None,
            f"{trained!r} is trainable, and only one adapter can be: detach or delete it first",
        ),
    )
    if record is None:
        record = new_record(model, adapter.couplings)
    check_fits(adapter, model, record)
    if not trainable:
        check_plain_and_untied(model, record, adapter.deltas)
        check_own_memory(model, [record.projections[path] for path in adapter.deltas])
    record.fingerprint = record.fingerprint or adapter.fingerprint  # a model on the meta device has none yet
    if not trainable:
        adapter.structure = adapter.structure or structure_of(model, record.couplings, adapter.deltas)
        if device is not None:
            adapter = replace(adapter.to(device), device=torch.device(device))
        _load(model, record, adapter, active)
        return Report.of_loaded(model, adapter)
    if any(weight_at(model, record.projections[path]).read_only for path in adapter.deltas):
        adapter.config = replace(adapter.config, layout="indexed")  # units of quantized weights can't move
    with starting_from_base(model, record):
        mount_proved(model, record, adapter.config, adapter.selection, adapter.name, verify, example)
        set_mounted_deltas(record, adapter.deltas)
        unfreeze(model, record, adapter.extra_weights)
        set_extra(model, record, adapter.extra_weights)
        of_the_base = model_info(model)  # saving writes these values again
        record.add_info({key: value for key, value in adapter.info.items() if of_the_base.get(key) is None})
    return Report.of(model)


def _load(model: nn.Module, record: Record, adapter: Adapter, active: bool) -> None:
    """Add a loaded adapter, and make it the active one if `active`. After a failure everything is as before."""
    is_new, before = find_record(model) is None, dict(record.active)

    def change() -> None:
        if is_new:
            add_record_and_hooks(model, record)
            model.requires_grad_(False)
        record.loaded[adapter.name] = adapter
        place_loaded(model, record, [adapter.name])
        if active:
            switch(model, record, {adapter.name: 1.0})

    def recover() -> None:
        deactivate(model, record)
        if is_new:
            make_plain(model, record)
        else:
            record.drop(adapter.name)
            switch(model, record, before)

    all_or_nothing(change, recover)


@on_unwrapped
def restore_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Copy a saved adapter's deltas into the trainable layers of a model, to resume its training.

    Args:
        model: Model with a trainable adapter of the same selection.
        directory: Folder or hub repository as in :func:`read_adapter`.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: The adapter has another selection or another base than the model, or its files are damaged.

    Example:
        >>> from s2ft.attached.loading import restore_adapter
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.save_adapter(model, "checkpoint")
        >>> restore_adapter(model, "checkpoint")
    """
    record = record_of(model)
    adapter = read_adapter(directory)
    check_fits(adapter, model, record)
    if record.selection is None or adapter.selection != record.selection:
        raise ValueError(f"{directory} holds another selection than the one this model trains")
    set_trained(model, record, adapter.deltas, adapter.extra_weights)


# ---- switching, and what is done with loaded adapters ---------------------------------------------------------------

Weights = str | Mapping[str, float] | None


@on_unwrapped
def set_adapter(model: nn.Module, adapters: Weights) -> None:
    """Make one adapter active, or several in a weighted sum, or none.

    The base is restored bit for bit. The time that this takes does not depend on the number of loaded adapters. The
    trainable adapter gets gradients if its weight is 1.

    Args:
        model: Model with adapters.
        adapters: A name, weights by name such as ``{"a": 0.7, "b": 0.3}``, or None for the base.

    Raises:
        ValueError: No adapter has this name, a weight is not a finite number, an extra weight would be scaled or is in
            two, or the base is quantized. The active adapters are then unchanged.
        TypeError: `adapters` is of another type.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.set_adapter(model, None)
        >>> s2ft.set_adapter(model, {"math": 0.5})
        >>> s2ft.status(model).active
        {'math': 0.5}
    """
    record = record_of(model)
    switch(model, record, _weights(record, adapters))


def _weights(record: Record, adapters: Weights) -> dict[str, float]:
    """Check names and weights, and return them as a dict."""
    if adapters is None:
        return {}
    weights = {adapters: 1.0} if isinstance(adapters, str) else adapters
    if not isinstance(weights, Mapping):
        raise TypeError(f"adapters must be a name, weights by name, or None, got {type(adapters).__name__}")
    for name, weight in weights.items():
        check_known(record, name)
        check_weight(name, weight)
    return {name: float(weight) for name, weight in weights.items()}


@on_unwrapped
@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Context manager: inside, the model is its base, bit for bit.

    Afterwards the adapters that were active are active again.

    Args:
        model: Model with adapters.

    Returns:
        A context manager.

    Raises:
        ValueError: The model has no adapters, or an adapter with a weight other than 1 has a parameter that was
            unfrozen by hand. Nothing has changed.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> with s2ft.disable_adapters(model):
        ...     base_logits = model(input_ids).logits
    """
    record = record_of(model)
    active = dict(record.active)
    check_can_put_on_extra(model, record, active)  # else the end of the context could not make them active again
    set_adapter(model, None)
    try:
        yield
    finally:
        if find_record(model) is record:  # what was deleted or renamed meanwhile stays off
            set_adapter(model, {name: weight for name, weight in active.items() if name in record.names})


@on_unwrapped
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> Overlap:
    """Add the weighted sum of adapters to the model as a new loaded adapter, which is not active.

    Args:
        model: Model with the adapters.
        weights: Weights by adapter, at least one.
        name: Name of the new adapter.

    Returns:
        The units that the adapters share. The sum of adapters on disjoint units keeps each of them exactly.

    Raises:
        ValueError: No adapter has one of these names, a weight is not a finite number, `name` is taken, or the base is
            quantized.
        TypeError: `weights` is not a mapping, or is empty.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> _ = s2ft.load_adapter(model, s2ft.get_adapter(model, "math"), "copy", active=False)
        >>> _ = s2ft.combine_adapters(model, {"math": 0.7, "copy": 0.3}, "both")
        >>> s2ft.list_adapters(model)
        ['math', 'copy', 'both']
    """
    record = record_of(model)
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"weights must be numbers by adapter, at least one, got {weights!r}")
    weights = _weights(record, weights)
    check_new_name(record, name)
    adapters = {part: get_adapter(model, part) for part in weights}
    combined = weighted_sum([(adapters[part], weight) for part, weight in weights.items()], name)
    check_plain_and_untied(model, record, combined.deltas)
    record.loaded[name] = combined
    return overlap(list(adapters.values()))


def list_adapters(model: nn.Module) -> list[str]:
    """Return the names of all adapters, the trainable one first; an empty list for a model without adapters.

    Args:
        model: Any model.

    Returns:
        The names.

    Example:
        >>> s2ft.list_adapters(model)
        []
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.list_adapters(model)
        ['math']
    """
    return status(model).adapters


@on_unwrapped
def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter from a model.

    If it is active, all active adapters are switched off first; else they stay active. With the last adapter the model
    becomes the plain base, as after :func:`s2ft.detach`.

    Args:
        model: Model with the adapter.
        name: Name of the adapter.

    Raises:
        ValueError: No adapter has this name, or the model is sharded and the adapter is the trainable or the last one.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> _ = s2ft.load_adapter(model, s2ft.get_adapter(model, "math"), "copy", active=False)
        >>> s2ft.delete_adapter(model, "copy")
        >>> s2ft.list_adapters(model)
        ['math']
    """
    record = record_of(model)
    check_known(record, name)
    if name == record.trainable or len(record.names) == 1:
        check_not_in_engine(model, "deleting the trainable or the last adapter", removes=True)
    if name in record.active:
        deactivate(model, record)
    if record.names == [name]:
        remove_all(model, record)
    elif name != record.trainable:
        record.drop(name)
    else:
        end_training(model, record)


@on_unwrapped
def freeze_adapter(model: nn.Module) -> None:
    """End the training of the trainable adapter: it becomes a loaded one, and the model can train another.

    The model computes what it computed before, with the same bits if no other active adapter has the same units: an
    adapter that was active is active again, with its weight. Slices that were trained through a codec become what the
    file will hold, to the last bit of float32. All parameters are frozen.
    :func:`s2ft.attach` with ``on_top=True`` then trains the next adapter on top of it.

    Args:
        model: Model with a trainable adapter.

    Raises:
        ValueError: The model trains no adapter, its base is quantized, or DeepSpeed's engine holds it.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.freeze_adapter(model)
        >>> s2ft.status(model).trainable, s2ft.status(model).active
        (None, {'math': 1.0})
    """
    record = record_of(model)
    if record.trainable is None:
        raise ValueError(f"the model trains no adapter; it has {', '.join(record.names)}: there is nothing to freeze")
    check_not_in_engine(model, "freezing the trainable adapter", removes=True)
    adapter = get_adapter(model, record.trainable)
    check_plain_and_untied(model, record, adapter.deltas)
    adapter.deltas = coded_deltas(record, adapter.deltas)
    end_training(model, record, adapter)


@on_unwrapped
def rename_adapter(model: nn.Module, name: str, new: str) -> None:
    """Rename an adapter. It stays active and trainable if it was.

    Args:
        model: Model with the adapter.
        name: Name of the adapter.
        new: New name.

    Raises:
        ValueError: No adapter has this name, or the new name is taken or could not be saved.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.rename_adapter(model, "math", "algebra")
        >>> s2ft.list_adapters(model)
        ['algebra']
    """
    record = record_of(model)
    check_known(record, name)
    check_new_name(record, new)
    record.rename(name, new)
