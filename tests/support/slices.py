"""Attached models whose adapter changes the output."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from s2ft import S2FTConfig
from support.inside import storages
from support.models import ALL_RATIOS, loss_of, model_of, ratios_for
from support.states import randomize, with_adapter
from support.tolerances import relative_difference


def plain_model(case: str, layers: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in training mode without caches, with its first `layers` layers."""
    model = model_of(case, dtype)
    for module in list(model.modules()):
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
        if isinstance(module, nn.ModuleList) and layers:
            del module[layers:]
    if layers:
        model.config.num_hidden_layers = layers
    return model.train()


def everything(case: str, **more) -> S2FTConfig:
    """All ratios of the model, and other options."""
    return S2FTConfig(**{**ratios_for(case, ALL_RATIOS), **more})


def attached(case: str, layers: int | None = None, dtype: torch.dtype = torch.float32, **more) -> nn.Module:
    """:func:`plain_model` with random values in all trained slices."""
    return randomize(with_adapter(plain_model(case, layers, dtype), everything(case, **more)))


def slices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every other tensor of the model."""
    return {name: value.clone() for name, value in model.state_dict().items() if not name.endswith(".s2")}


def gradients(model: nn.Module, loss=loss_of, scale: float = 1.0) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    (loss(model) * scale).backward()
    return {name: parameter.grad for name, parameter in slices(model).items()}


def assert_same(ours: dict, theirs: dict, within: float = 0.0) -> None:
    """The same gradients. A tower whose output is not used has none."""
    assert ours.keys() == theirs.keys() and any(gradient is not None and gradient.any() for gradient in theirs.values())
    for name, gradient in ours.items():
        assert (gradient is None) == (theirs[name] is None), name
        if gradient is not None and not torch.equal(gradient, theirs[name]):
            assert relative_difference(gradient, theirs[name]) <= within, name


def bytes_kept(given: Iterable[torch.Tensor], call: Callable) -> int:
    """How many bytes a call keeps for its backward, beside the tensors that it was given. A storage counts once."""
    own = {storage.data_ptr() for tensor in given for storage in storages(tensor)}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()  # stays alive while bytes are counted, so that no address is reused
    total = sum(kept.values())
    del output
    return total
