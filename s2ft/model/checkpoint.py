"""Weights that stay in a checkpoint on a disk. They are read one at a time, when they are needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.files.reading import read_json
from s2ft.files.streaming import StoredTensor, stored_tensors
from s2ft.files.tables import by_key
from s2ft.model.conversion import CannotStream, Group, loading_groups

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SOURCE = "_s2ft_values"  # the attribute of a parameter on the meta device: a function that reads its values


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a model.

    Attributes:
        folder: Folder of the files.
        tensors: Where each tensor is, by its name in the files.
    """

    folder: Path
    tensors: dict[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first tensor of floating-point numbers."""
        dtypes = (stored.dtype for stored in self.tensors.values())
        return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)


def open_checkpoint(source: str | os.PathLike) -> Checkpoint:
    """Find the tensors of a checkpoint. Only the files' headers are read.

    Args:
        source: Folder with model.safetensors, or with its index and the files that it names, or a name on the hub,
            whose files are downloaded if they are not in the cache.

    Raises:
        CannotStream: The checkpoint has no safetensors files.
        FileNotFoundError: The folder, or a file that the index names, does not exist.
        ValueError: A file is damaged.
    """
    index = _find(source, INDEX)
    if index is None:
        file = _find(source, WEIGHTS)
        if file is None:
            raise CannotStream(f"{source} has no {WEIGHTS}")
        return Checkpoint(file.parent, stored_tensors(file))
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map")
    tensors = {}
    for name in sorted(set(where.values())):
        file = _find(source, name) if Path(name).name == name else None
        if file is None:
            raise FileNotFoundError(f"{index} names {name}, which does not exist there")
        tensors.update({key: stored for key, stored in stored_tensors(file).items() if where.get(key) == name})
    lost = sorted(where.keys() - tensors.keys())
    if lost:
        raise ValueError(f"{index} names {lost[0]}, which is not in {where[lost[0]]}")
    return Checkpoint(index.parent, tensors)


def _find(source: str | os.PathLike, name: str) -> Path | None:
    """The path of a checkpoint's file, which may be downloaded; None if the checkpoint has no such file."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if folder.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
        raise FileNotFoundError(f"there is no checkpoint {source}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except EntryNotFoundError:  # also where the hub can't be asked and the cache has no such file
        return None


class StoredWeights:
    """The weights of a model, as `from_pretrained` would load them from a checkpoint.

    Attributes:
        model: The model.
        checkpoint: The checkpoint.
        unused: Names of the checkpoint's tensors that no weight is made from.
        transforms: Transforms of transformers that were used, for :func:`s2ft.model.conversion.saving_groups`.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Find how each weight is made from the checkpoint's tensors. No values are read.

        Args:
            model: The model. Its weights may be on the meta device; their dtypes are those of the result.
            checkpoint: The checkpoint.

        Raises:
            CannotStream: The weights can't be converted one at a time.
            ValueError: The checkpoint is of another model.
        """
        self.model, self.checkpoint = model, checkpoint
        stored = {name: tensor.empty() for name, tensor in checkpoint.tensors.items()}
        self._groups, self.unused, self.transforms = loading_groups(model, stored)
        self._names = {name: name for name in self._groups}  # by each name of a weight, the one that is stored
        for names in tied_names(model):
            known = next((name for name in names if name in self._groups), None)
            if known is not None:
                self._names.update({name: known for name in names if name not in self._groups})

    def __contains__(self, name: str) -> bool:
        """Whether the checkpoint has this weight."""
        return name in self._names

    def group(self, name: str) -> Group:
        """The group that makes a weight. Raises KeyError if the checkpoint does not have it."""
        return self._groups[self._names[name]]

    def name(self, name: str) -> str:
        """The name under which the checkpoint has a weight: another one for a tied weight that is stored once."""
        return self._names[name]

    def read(self, name: str) -> Tensor:
        """Read one weight into memory of its own.

        Raises:
            KeyError: The checkpoint does not have it.
            ValueError: A file is truncated.
        """
        return self.read_group(self.group(name))[self._names[name]]

    def read_group(self, group: Group) -> dict[str, Tensor]:
        """Read all weights that a group makes, by name."""
        return group.convert(self.model, lambda source: self.checkpoint.tensors[source].read())


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every parameter and buffer that has several, first those by which the model owns it."""
    names = by_key((id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items())
    return [found for found in names.values() if len(found) > 1]


@contextmanager
def weights_on_disk(model: nn.Module, checkpoint: str | os.PathLike) -> Iterator[nn.Module]:
    """Let s2ft read the weights of a model on the meta device from a checkpoint. The model does not change.

    Inside this context :func:`attach`, :func:`select`, :func:`plan` and ``load_adapter(..., trainable=True)`` work on a
    model that has no values yet: they read one weight at a time, where they need its values (the fingerprint of the
    base, the selection by weight), and forget it. Memory stays below the size of a few weights. Weights that have
    values already are used as they are, so every rank of a distributed program can do the same.

    Args:
        model: A model of transformers, or any model whose checkpoint has the names of its weights. The dtypes of its
            weights are those in which they are read.
        checkpoint: Folder with safetensors files, or a name on the hub.

    Returns:
        A context manager, which gives the model.

    Raises:
        FileNotFoundError: A file of the checkpoint does not exist.
        ValueError: The checkpoint has no safetensors files, is damaged, or is of another model.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> model.save_pretrained("base")
        >>> with torch.device("meta"):
        ...     hollow = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("base"))
        >>> with s2ft.weights_on_disk(hollow, "base"):
        ...     selection = s2ft.select(hollow, s2ft.S2FTConfig(d_ratio=0.1, selection="weight"))
        >>> selection == s2ft.select(model, s2ft.S2FTConfig(d_ratio=0.1, selection="weight"))
        True
    """
    with read_from(model, StoredWeights(model, open_checkpoint(checkpoint))):
        yield model


@contextmanager
def read_from(model: nn.Module, weights: StoredWeights) -> Iterator[None]:
    """Inside, :meth:`s2ft.model.weights.WeightHandle.full` reads weights on the meta device from a checkpoint."""
    found: list[Any] = []
    try:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and tensor.is_meta and name in weights and not hasattr(tensor, SOURCE):
                found.append(tensor)
                setattr(tensor, SOURCE, partial(weights.read, name))
        yield
    finally:
        for tensor in found:
            delattr(tensor, SOURCE)
