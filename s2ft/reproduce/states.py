"""States of a model on disk, to compare all its weights with them later, bit for bit."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def save_state(model: nn.Module, file: Path) -> None:
    """Write all parameters and buffers of a model.

    Args:
        model: The model. Its trainable layers, if it has any, are not those of the base: detach or freeze them first.
        file: The file, whose folder is made if it does not exist.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in _tensors(model).items()}, file)


def differing(model: nn.Module, file: Path) -> list[str]:
    """Return the names of the parameters and buffers that differ in a bit from those of a file.

    Args:
        model: The model.
        file: A file of :func:`save_state`.

    Returns:
        The names, also of tensors that only the model or only the file has; empty if the states are equal.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.reproduce.states import differing, save_state
        >>> save_state(model, Path("state.safetensors"))
        >>> differing(model, Path("state.safetensors"))
        []
    """
    mine = _tensors(model)
    with safe_open(file, "pt") as theirs:
        names = set(theirs.keys())
        wrong = [name for name in names & mine.keys() if not _same_bits(mine[name], theirs.get_tensor(name))]
    return sorted([*wrong, *(names ^ mine.keys())])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits. torch.equal would take 0.0 for -0.0."""
    one = one.detach().cpu().contiguous()
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
