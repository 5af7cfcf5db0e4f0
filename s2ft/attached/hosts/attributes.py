"""Attributes of a model that others have set, which host hooks replace while trainable layers are mounted."""

from collections.abc import Sequence

from torch import nn

from s2ft.attached.record import Attachment


def keep_attributes(model: nn.Module, record: Attachment, names: Sequence[str]) -> None:
    """Record the model's own attributes of these names, before they are replaced."""
    record.replaced_attributes = {name: model.__dict__[name] for name in names if name in model.__dict__}


def restore_attributes(model: nn.Module, record: Attachment, names: Sequence[str]) -> None:
    """Give the model back what :func:`keep_attributes` has recorded. Without a call of it, nothing happens."""
    if record.replaced_attributes is None:
        return
    for name in names:
        if name in record.replaced_attributes:
            model.__dict__[name] = record.replaced_attributes[name]
        else:
            model.__dict__.pop(name, None)
