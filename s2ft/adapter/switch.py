"""Which adapters a model has, and which of them are active."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from s2ft.adapter.adapter import Adapter, Overlap, check_weight, overlap, weighted_sum
from s2ft.attached.active import mounted_deltas, switch
from s2ft.attached.changes import end_training, remove
from s2ft.attached.checks import check_can_write, check_known, check_new_name, check_not_in_engine
from s2ft.attached.extra_weights import check_can_put_on, trained_values
from s2ft.attached.hosts.wrappers import of_compiled
from s2ft.attached.record import Attachment, attachment_of
from s2ft.attached.status import status
from s2ft.distributed import reshard_all
from s2ft.model.location import structure_of

Weights = str | Mapping[str, float] | None


@of_compiled
def set_adapter(model: nn.Module, adapters: Weights) -> None:
    """Make one adapter active, or several in a weighted sum, or none.

    The base is restored bit for bit. The time that this takes does not depend on the number of loaded adapters. The
    trainable adapter gets gradients if its weight is 1: the forward then adds it, on top of the others.

    Args:
        model: Model with adapters.
        adapters: A name, weights by name such as ``{"a": 0.7, "b": 0.3}``, or None for the base.

    Raises:
        ValueError: No adapter has this name, a weight is not a finite number, or the base is quantized. The active
            adapters are then unchanged.
        TypeError: `adapters` is of another type.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.set_adapter(model, None)
        >>> s2ft.set_adapter(model, {"math": 0.5})
        >>> s2ft.status(model).active
        {'math': 0.5}
    """
    record = attachment_of(model)
    switch(model, record, _weights(record, adapters))


def _weights(record: Attachment, adapters: Weights) -> dict[str, float]:
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


@of_compiled
@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Context manager: inside, the model is its base, bit for bit.

    Afterwards the adapters that were active are active again.

    Args:
        model: Model with adapters.

    Returns:
        A context manager.

    Raises:
        ValueError: The model has no adapters, or a weight that was unfrozen by hand belongs to an adapter whose weight
            is not 1. Nothing has changed.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> with s2ft.disable_adapters(model):
        ...     base_logits = model(input_ids).logits
    """
    record = attachment_of(model)
    active = dict(record.active)
    check_can_put_on(model, record, active)  # else the end of the context could not make them active again
    set_adapter(model, None)
    try:
        yield
    finally:
        set_adapter(model, active)


@of_compiled
def get_adapter(model: nn.Module, name: str, state: Mapping[str, Tensor] | None = None) -> Adapter:
    """Return a loaded adapter, or a copy of the trainable one as it is now.

    Adapters support arithmetic: ``a + b``, ``0.5 * a``, ``-a``. The trainable adapter of a sharded model is gathered:
    every rank must call this.

    Args:
        model: Model with adapters.
        name: Name of the adapter.
        state: A gathered state_dict that has every s2 of the trainable adapter. Default: the model's own.

    Returns:
        The adapter, with deltas in the base's own order.

    Raises:
        ValueError: No adapter has this name, or the state lacks an s2.
        RuntimeError: A rank did not take part within ten minutes.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> half = 0.5 * s2ft.get_adapter(model, "math")
        >>> s2ft.load_adapter(model, half, "half", active=False)
    """
    record = attachment_of(model)
    check_known(record, name)
    if name != record.name:
        return record.loaded[name]
    reshard_all(model)
    deltas = mounted_deltas(record, state)
    return Adapter(
        name,
        record.config,
        record.selection,
        record.fingerprint,
        deltas,
        dict(record.info),
        couplings=record.custom_couplings,
        extra_weights=trained_values(model, record, state),
        structure=structure_of(model, record.couplings, deltas),
    )


@of_compiled
def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> Overlap:
    """Add the weighted sum of adapters to the model as a new loaded adapter, which is not active.

    Args:
        model: Model with the adapters.
        weights: Weights by adapter, at least one.
        name: Name of the new adapter.

    Returns:
        The units that the adapters share. The sum of adapters on disjoint units keeps each of them exactly.

    Raises:
        ValueError: No adapter has one of these names, a weight is not a finite number, or `name` is taken.
        TypeError: `weights` is not a mapping, or is empty.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), name="math")
        >>> s2ft.load_adapter(model, s2ft.get_adapter(model, "math"), "copy", active=False)
        >>> _ = s2ft.combine_adapters(model, {"math": 0.7, "copy": 0.3}, "both")
        >>> s2ft.list_adapters(model)
        ['math', 'copy', 'both']
    """
    record = attachment_of(model)
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"weights must be numbers by adapter, at least one, got {weights!r}")
    weights = _weights(record, weights)
    check_new_name(record, name)
    adapters = {part: get_adapter(model, part) for part in weights}
    record.load(weighted_sum([(adapters[part], weight) for part, weight in weights.items()], name))
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


@of_compiled
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
        >>> s2ft.load_adapter(model, s2ft.get_adapter(model, "math"), "copy", active=False)
        >>> s2ft.delete_adapter(model, "copy")
        >>> s2ft.list_adapters(model)
        ['math']
    """
    record = attachment_of(model)
    check_known(record, name)
    if name == record.name or len(record.names) == 1:
        check_not_in_engine(model, "deleting the trainable or the last adapter", removes=True)
    remove(model, record, name)


@of_compiled
def freeze_adapter(model: nn.Module) -> None:
    """End the training of the trainable adapter: it becomes a loaded one, and the model can train another.

    The model computes what it computed before, with the same bits: an adapter that was active is active again, with its
    weight. Its slice is written into the weights, where training added it in the forward. All parameters are frozen.
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
    record = attachment_of(model)
    if record.name is None:
        raise ValueError(f"the model trains no adapter; it has {', '.join(record.names)}: there is nothing to freeze")
    check_not_in_engine(model, "freezing the trainable adapter", removes=True)
    adapter = get_adapter(model, record.name)
    check_can_write(model, record, adapter.deltas)
    end_training(model, record, adapter)


@of_compiled
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
    record = attachment_of(model)
    check_known(record, name)
    check_new_name(record, new)
    record.rename(name, new)
