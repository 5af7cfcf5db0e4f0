"""Forward passes without the trainable adapter, in the middle of its training.

:func:`s2ft.disable_adapters` restores the base by writing it into parameters. A graph that was recorded before then
can't be used for a backward pass any more. The function of this module writes nothing.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from s2ft.attached.record import Attachment, attachment_of


@contextmanager
def without_trainable(model: nn.Module) -> Iterator[None]:
    """Leave the trainable adapter out of the forward inside the context. Other active adapters stay.

    No memory is written, except that a fused adapter is unfused and fused again. A backward pass may follow on a graph
    that was recorded before.

    Args:
        model: Model with an adapter.

    Raises:
        ValueError: The model has no adapters.
    """
    record = attachment_of(model)
    if not record.trains:
        yield
        return
    layers = [mount.layer for mount in record.mounts.values()]
    with ExitStack() as stack:
        for layer in layers:
            if layer.fused:
                stack.callback(layer.fuse)
                layer.unfuse()
            stack.callback(setattr, layer, "enabled", True)
            layer.enabled = False
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
