"""What a forward changes in a model besides its outputs: modes, buffers, attributes and random states."""

import random
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the context, and restore the mode of each module afterwards.

    Args:
        model: Any module. Its modules may be in different modes.

    Example:
        >>> model = model.train()
        >>> with s2ft.model.modes.evaluation_mode(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def forward_hooks(model: nn.Module) -> list[tuple[dict, set]]:
    """Return the dicts of forward hooks and pre-hooks of all modules, and their keys of now."""
    return [(one, set(one)) for module in model.modules() for one in (module._forward_pre_hooks, module._forward_hooks)]


def remove_new_hooks(found: list[tuple[dict, set]]) -> None:
    """Remove the hooks of s2ft that :func:`forward_hooks` has not seen.

    An interrupt may come when PyTorch has registered a hook, before anyone has the handle that removes it. Hooks of
    others stay: transformers registers some in the first forward, and counts on them in all later ones.
    """
    for hooks, keys in found:
        for key in hooks.keys() - keys:
            function = getattr(hooks[key], "func", hooks[key])  # of a partial
            if str(getattr(function, "__module__", "")).partition(".")[0] == "s2ft":
                hooks.pop(key, None)


class Rest:
    """Modes, attributes, buffers and forward hooks of modules, and which parameters train, as when this was made.

    :meth:`restore` can be called any number of times, and an interrupt in it does no harm: the next call finishes it.
    """

    def __init__(
        self, model: nn.Module, modes_only: Collection[nn.Module] = (), trained: Iterable[Tensor] = ()
    ) -> None:
        """Remember them.

        Args:
            model: The model.
            modes_only: Modules of which only the mode is remembered.
            trained: Parameters that require a gradient.
        """
        self.trained = list(trained)
        self.modes = [(module, module.training) for module in model.modules()]
        self.hooks = forward_hooks(model)
        whole = [module for module in model.modules() if module not in modes_only]
        self.attributes = [(module, _public(module)) for module in whole]
        self.buffers = [(module, dict(module._buffers)) for module in whole]
        # Layers of bitsandbytes move their scales from the weight to their `state` when they run first.
        objects = [*model.parameters(), *(module.__dict__.get("state") for module in whole)]
        self.objects = [(one, dict(vars(one))) for one in objects if getattr(one, "__dict__", None)]
        found = {id(one): one for _, buffers in self.buffers for one in buffers.values() if one is not None}
        self.values = [(one, one.clone()) for one in found.values() if not (one.is_inference() or one.is_meta)]

    def restore(self) -> None:
        """Give the modules what they had."""
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for module, training in self.modes:
            module.training = training
        remove_new_hooks(self.hooks)
        for module, attributes in self.attributes:
            for name in _public(module).keys() - attributes.keys():
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)
        for thing, attributes in self.objects:
            vars(thing).update(attributes)
        for module, buffers in self.buffers:
            module._buffers.update(buffers)
            for name in module._buffers.keys() - buffers.keys():
                module._buffers.pop(name, None)
        for buffer, value in self.values:
            if not torch.equal(buffer, value):  # BatchNorm's kernels don't raise the version of their statistics
                buffer.detach().copy_(value)


def _public(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside, all random numbers start from a seed; afterwards the random states are as before."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
