"""Whole changes of a model with adapters. Each succeeds, or leaves a model whose base can be restored.

A change that an interrupt, an exception or an out-of-memory error cuts short is finished or taken back in the
`except` clause, and can be taken back by a later call. No step runs under torch.no_grad, which an interrupt can leave
switched on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from s2ft.attached.active import activate, deactivate, place_loaded, switch
from s2ft.attached.holding import write_slices
from s2ft.attached.mounting import claim, install, release, unmount
from s2ft.attached.record import Attachment, LoadedAdapter, find_attachment
from s2ft.ops._memory import WRITING


def whole(change: Callable[[], Any], recover: Callable[[], Any] | None = None) -> Any:
    """Make a change that nothing leaves half done.

    It is no context manager: an interrupt in the middle of ``__exit__`` would put the recovery off.

    Args:
        change: The change. Where `recover` is None it can be called again.
        recover: What to do after an interrupt, an exception or an out-of-memory error. Default: `change` again.

    Returns:
        What `change` returns.
    """
    with WRITING:
        try:
            return change()
        except BaseException:  # a model in between would compute something else
            (recover or change)()
            raise


@contextmanager
def adapters_off(model: nn.Module, record: Attachment) -> Iterator[None]:
    """Inside, the model has its record and the base in its weights, so that a trainable adapter can be mounted.

    If the body fails, the loaded adapters are there, those that were active are active again, and a model without
    loaded adapters is plain.
    """
    active = dict(record.active)
    try:
        claim(model, record)
        deactivate(model, record)
        yield
    except BaseException:
        deactivate(model, record)
        unmount(model, record)
        if record.loaded:
            record.forget_mounts()
            model.requires_grad_(False)
            activate(model, record, active)
        else:
            release(model, record)
        raise


def load(model: nn.Module, record: Attachment, adapter: LoadedAdapter, active: bool) -> None:
    """Add a loaded adapter, and make it the active one if `active`. A failure removes it again.

    Args:
        model: A model that has this record, or that has none yet.
        record: Record that gets the adapter.
        adapter: Adapter that fits the model, under a new name.
        active: Whether it becomes the active adapter.
    """
    is_new = find_attachment(model) is None

    def change() -> None:
        if is_new:
            claim(model, record)
            model.requires_grad_(False)
        record.load(adapter)
        place_loaded(model, record, [adapter.name])
        if active:
            switch(model, record, {adapter.name: 1.0})

    def recover() -> None:
        deactivate(model, record)
        if is_new:
            release(model, record)
        else:
            record.drop(adapter.name)

    whole(change, recover)


def remove_all(model: nn.Module, record: Attachment) -> None:
    """Remove all adapters and the record: the model is the plain base, bit for bit."""

    def change() -> None:
        if find_attachment(model) is not None:
            deactivate(model, record)
            release(model, record)

    whole(change)


def remove(model: nn.Module, record: Attachment, name: str) -> None:
    """Remove one adapter; if it is active, no adapter is active afterwards. With the last one the model is plain."""
    if name in record.active:
        deactivate(model, record)
    if record.names == [name]:
        remove_all(model, record)
    elif name != record.name:
        record.drop(name)
    else:
        end_training(model, record)


def end_training(model: nn.Module, record: Attachment, adapter: LoadedAdapter | None = None) -> None:
    """Remove the trainable layers. What was active is active again, with the same bits in the weights.

    Args:
        model: Model of the record.
        record: Record with a trainable adapter.
        adapter: A copy of the trainable adapter, which can be written into the weights and is loaded in its place.
    """
    active = dict(record.active)

    def replace() -> None:
        deactivate(model, record)
        unmount(model, record)
        record.forget_mounts()
        model.requires_grad_(False)
        if adapter is not None:
            record.load(adapter)

    def change() -> None:
        replace()
        activate(model, record, active)

    whole(change, recover=replace)  # then no adapter is active


def merge_active(model: nn.Module, record: Attachment) -> nn.Module:
    """Write the active adapters into the weights and return the plain model. A failure leaves the adapter, inactive."""

    def change() -> nn.Module:
        write_slices(model, record)
        return release(model, record)

    def recover() -> None:
        if find_attachment(model) is not None:
            claim(model, record)
            for move in record.moves:
                move.recover(model)
            if record.name is None:
                model.requires_grad_(False)
            else:  # the layers restore the base in their own order of units
                install(model, record, record.extra.base)
            deactivate(model, record)

    return whole(change, recover)
