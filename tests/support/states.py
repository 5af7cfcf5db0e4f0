"""Comparing models bit for bit, and models with an adapter."""

import copy
import io
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import s2ft


def same(ours: nn.Module | dict, theirs: nn.Module | dict) -> bool:
    """Whether two models, or the states of two, have the same names and the same bits."""
    ours, theirs = (one.state_dict() if isinstance(one, nn.Module) else one for one in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Add random numbers to all that a model trains, the same each time. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def assert_same_adapters(ours: s2ft.Adapter, theirs: s2ft.Adapter) -> None:
    """The same units, deltas and weights in full, bit for bit."""
    assert ours.selection == theirs.selection and ours.deltas.keys() == theirs.deltas.keys()
    for path, delta in ours.deltas.items():
        other = theirs.deltas[path]
        assert delta.dim == other.dim and torch.equal(delta.index, other.index), path
        assert delta.values.dtype == other.values.dtype and torch.equal(delta.values, other.values), path
    assert same(ours.extra_weights, theirs.extra_weights)


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The plain weights that a model computes with, in the base's order, of a merged copy."""
    return s2ft.merge(copy.deepcopy(model)).state_dict()


def with_adapter(model: nn.Module, config: s2ft.S2FTConfig, *name: str, **options) -> nn.Module:
    """Attach an adapter to a model. Returns the model."""
    s2ft.attach(model, config, *name, **options)
    return model


def with_loaded(model: nn.Module, adapter, *name: str, **options) -> nn.Module:
    """Load an adapter into a model. Returns the model."""
    s2ft.load_adapter(model, adapter, *name, **options)
    return model


def saved_adapter(model: nn.Module, folder: Path) -> Path:
    """Save the trainable adapter of a model. Returns the folder."""
    s2ft.save_adapter(model, folder)
    return folder


def saved_and_loaded(value):
    """What torch.load reads of what torch.save has written."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def tensors_of(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder by name."""
    return {name: one for file in sorted(Path(folder).glob("*.safetensors")) for name, one in load_file(file).items()}


def flip(file: Path, place: int = -1) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
