"""Forward passes without the trainable adapter, in the middle of its training.

:func:`s2ft.disable_adapters` restores the base by writing it into parameters. A graph that was recorded before then
can't be used for a backward pass any more, if it needs one of them. The function of this module changes no version of
a parameter.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from s2ft.attached.holding import write_slices
from s2ft.attached.record import Attachment, attachment_of
from s2ft.distributed import reshard_all


@contextmanager
def without_trainable(model: nn.Module) -> Iterator[None]:
    """Leave the trainable adapter out of the forward inside the context. Other active adapters stay.

    The base is written into the slices, and base + s2 again afterwards. A backward pass may follow on a graph that was
    recorded before. Every rank of a sharded model must call this.

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
