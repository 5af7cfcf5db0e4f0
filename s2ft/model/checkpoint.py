"""Weights that stay in a checkpoint on a disk, and how transformers makes them from its tensors.

Most tensors keep their values and change their names at most. Others are converted: the experts of a mixture become one
parameter, or a weight of queries, keys and values is split. transformers has this knowledge as a list of transforms and
applies it to all weights at once. Here the same transforms are sorted into groups, so that one group can be
converted at a time. The functions of transformers that this needs are in its module core_model_loading, which has no
promise of stability: :func:`_loading` is the only place that knows their names.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.codecs.gguf_file import GgufFile
from s2ft.codecs.packed_folder import PackedFolder, has_codecs
from s2ft.distributed import full_shape
from s2ft.files.plain_text import sha256_of
from s2ft.files.reading import StoredTensor, gguf_files, read_json, stored_tensors
from s2ft.foreign import check_mentioned, read
from s2ft.model.coupling import by_key

# ---- how transformers makes weights from the tensors of a checkpoint, and back --------------------------------------


class CannotStream(ValueError):
    """Weights can't be converted one group at a time. The message says why; a caller may load the whole model."""


@dataclass
class Group:
    """Tensors that are made together from other tensors.

    Attributes:
        name: Name of the first tensor that is made.
        sources: Names of the tensors that they are made from, each with the pattern of the transform that it matches.
        transform: The WeightConverter of transformers; None if one tensor is passed on.
        made: The tensors that are made, by name, on the meta device.
        dtype: Dtype to which the sources are cast before they are converted; None keeps theirs.
        rename: Changes the names that the transform gives.
    """

    name: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    transform: Any = None
    made: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    rename: Callable[[str], str] = str

    def convert(self, model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Make the tensors.

        Args:
            model: The model, also on the meta device.
            read: Returns a source by name.

        Returns:
            The tensors by name.
        """
        if self.transform is None:
            return {self.name: read(self.sources[0][0]).to(dtype=self.dtype)}
        transform = deepcopy(self.transform)  # it forgets its tensors while it converts them
        for name, pattern in self.sources:
            transform.add_tensor(self.name, name, pattern, read(name).to(dtype=self.dtype))
        made = transform.convert(self.name, model=model, config=model.config)
        return {self.rename(name): values[0] if isinstance(values, list) else values for name, values in made.items()}


@cache
def _loading() -> SimpleNamespace:
    """The functions and classes of transformers that describe its conversions.

    Raises:
        CannotStream: This release of transformers lacks one of them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            PrefixChange,
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        import transformers

        raise CannotStream(
            f"transformers {transformers.__version__} does not say how it converts weights ({error})"
        ) from error
    return SimpleNamespace(
        PrefixChange=PrefixChange,
        WeightConverter=WeightConverter,
        WeightRenaming=WeightRenaming,
        dot_natural_key=dot_natural_key,
        rename_source_key=rename_source_key,
        mapping=get_model_conversion_mapping,
    )


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, whose checkpoints may have other names than its weights."""
    return hasattr(model, "base_model_prefix") and hasattr(model, "config")


def is_of_compressed_tensors(module: nn.Module) -> bool:
    """Whether compressed-tensors has prepared a module for quantized weights.

    Raises:
        MissingForeignName: The installed release marks such modules in another way.
    """
    marks = sys.modules.get("compressed_tensors.quantization.lifecycle.apply")  # without it no module has a mark
    if marks is None:
        return False
    set_marks = marks.apply_quantization_config
    check_mentioned(set_marks, "quantization_scheme", "compressed-tensors", "modules of quantized weights")
    return hasattr(module, "quantization_scheme")


def conversions_of(model: nn.Module) -> list[Any] | None:
    """The transforms with which transformers loaded a model, for :func:`saving_groups`; None if it was not loaded.

    Raises:
        MissingForeignName: The installed transformers keeps them elsewhere.
    """
    if not is_of_transformers(model):
        return None
    from transformers.core_model_loading import revert_weight_conversion

    purpose = "the names that a model's checkpoint had"
    check_mentioned(revert_weight_conversion, "_weight_conversions", "transformers", purpose)
    return getattr(model, "_weight_conversions", None)


def dtype_plan(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the weights that transformers does not load in `dtype`, by patterns of their names.

    Raises:
        MissingForeignName: The installed transformers has no such plan.
    """
    return read(model, "_get_dtype_plan", "transformers", "weights that stay in float32")(dtype)


def loading_groups(model: nn.Module, stored: Mapping[str, Tensor]) -> tuple[dict[str, Group], list[str], list[Any]]:
    """Find how the weights of a model are made from the tensors of a checkpoint, as `from_pretrained` makes them.

    Args:
        model: The model. Its weights may be on the meta device; their dtypes are those of the result.
        stored: The checkpoint's tensors by name, on the meta device.

    Returns:
        The group of each weight by the weight's name, the names of tensors that no weight is made from, and the
        transforms that were used, for :func:`saving_groups`.

    Raises:
        CannotStream: transformers can't say how, or a transform refuses the tensors.
        ValueError: A weight would get another shape than the model has.
    """
    state = model.state_dict(keep_vars=True)
    if not is_of_transformers(model):
        found = {name: Group(name, [(name, name)], dtype=state[name].dtype) for name in stored if name in state}
        return _with_made(found.values(), model, stored), [name for name in stored if name not in state], []
    of = _loading()
    transforms = of.mapping(model)
    renamings, converters = (
        [one for one in transforms if isinstance(one, kind)] for kind in (of.WeightRenaming, of.WeightConverter)
    )
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}
    unused = []
    for name in sorted(stored, key=of.dot_natural_key):  # a converter concatenates its sources in this order
        new, pattern = of.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:
            new, pattern = of.rename_source_key(name, [], [], model.base_model_prefix, state)
        if new not in state:
            unused.append(name)
            continue
        group = groups.setdefault(new, Group(new, [], by_pattern.get(pattern), dtype=state[new].dtype))
        if group.sources and group.transform is None:
            raise CannotStream(f"{group.sources[0][0]} and {name} of the checkpoint both are {new} of the model")
        group.sources.append((name, name if pattern is None else pattern))
    return _with_made(groups.values(), model, stored, state), unused, [one for one in transforms if one.was_used()]


def saving_groups(model: nn.Module, transforms: list[Any] | None, names: Iterable[str]) -> list[Group]:
    """Find how a checkpoint's tensors are made from the weights of a model, as `save_pretrained` makes them.

    Args:
        model: The model. Its weights may be on the meta device.
        transforms: The transforms with which it was loaded; None for a model that was not loaded.
        names: Names of the weights to save.

    Returns:
        The groups.

    Raises:
        CannotStream: transformers can't say how, or a transform can't be inverted.
    """
    state, names = model.state_dict(keep_vars=True), list(names)
    if not is_of_transformers(model):
        return [Group(name, [(name, name)], made={name: _meta(state[name])}) for name in names]
    of = _loading()
    if transforms is None:  # without a checkpoint nothing tells whether its names had the prefix
        transforms = [one for one in of.mapping(model, add_legacy=False) if not isinstance(one, of.PrefixChange)]
    try:
        transforms = [one.reverse_transform() for one in reversed(transforms)]
    except Exception as error:  # each transform raises errors of its own
        raise CannotStream(f"transformers can't invert a conversion of this model: {error}") from error
    renamings, converters = (
        [one for one in transforms if isinstance(one, kind)] for kind in (of.WeightRenaming, of.WeightConverter)
    )
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    for name in sorted(names, key=of.dot_natural_key):
        converted = (converter.rename_source_key(name) for converter in converters)
        new, pattern = next((one for one in converted if one[1] is not None), (rename(name), None))
        group = groups.setdefault(new, Group(new, [], by_pattern.get(pattern), rename=rename))
        group.sources.append((name, name if pattern is None else pattern))
    _with_made(groups.values(), model, state)
    return list(groups.values())


def _with_made(
    groups: Iterable[Group],
    model: nn.Module,
    sources: Mapping[str, Tensor],
    expected: Mapping[str, Tensor] | None = None,
) -> dict[str, Group]:
    """Try each group on the meta device, note what it makes, and return the groups by what they make."""
    found: dict[str, Group] = {}
    for group in groups:
        try:
            group.made = group.convert(model, lambda name: _meta(sources[name]))
        except Exception as error:  # each transform raises errors of its own
            raise CannotStream(f"transformers can't convert {group.name} by itself: {error}") from error
        for name, made in group.made.items():
            if expected is not None and (name not in expected or made.shape != expected[name].shape):
                needed = tuple(expected[name].shape) if name in expected else "no such weight"
                raise ValueError(f"{name} is {tuple(made.shape)} in the checkpoint, and {needed} in the model")
            found[name] = group
    return found


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")


# ---- weights that stay in a checkpoint on a disk --------------------------------------------------------------------


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
    file = find_file(source, WEIGHTS)
    if file is not None:  # before an index, which may be of an earlier model, as in transformers
        return Checkpoint(file.parent, stored_tensors(file))
    index = find_file(source, INDEX)
    if index is None:
        raise CannotStream(f"{source} has no {WEIGHTS}")
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map")
    tensors = {}
    for name in sorted(set(where.values())):
        file = find_file(source, name) if Path(name).name == name else None
        if file is None:
            raise FileNotFoundError(f"{index} names {name}, which does not exist there")
        tensors.update({key: stored for key, stored in stored_tensors(file).items() if where.get(key) == name})
    lost = sorted(where.keys() - tensors.keys())
    if lost:
        raise ValueError(f"{index} names {lost[0]}, which is not in {where[lost[0]]}")
    return Checkpoint(index.parent, tensors)


def packed_base(source: str) -> GgufFile | PackedFolder | None:
    """Open the files of a base whose weights are packed; None if they are not, or in a format without codecs.

    Args:
        source: A .gguf file, a folder, or a name on the hub, whose files are downloaded if they are not in the cache.

    Raises:
        FileNotFoundError: The base does not exist.
        ValueError: A file is damaged.
    """
    if files := gguf_files(Path(source).expanduser()):  # of several, :func:`s2ft.text.models.locate` names one
        return GgufFile(files[0])
    config = find_file(source, "config.json")
    if config is None:
        return None
    try:
        settings = json.loads(config.read_bytes()).get("quantization_config")  # read_json refuses Infinity
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from None
    return PackedFolder(config.parent, open_checkpoint(source).tensors, settings) if has_codecs(settings) else None


def packed_hash(source: str) -> str | None:
    """The hash of the files of a base on this machine whose weights are packed; None for any other base."""
    path = Path(source).expanduser()
    with suppress(OSError, ValueError):  # a base that can't be read any more must not stop a save
        base = packed_base(source) if path.is_dir() and not gguf_files(path) else None
        files = base.files if isinstance(base, PackedFolder) else [path] * (path.suffix == ".gguf")
        return hash_of_files(files) if files else None
    return None


def hash_of_files(files: Iterable[Path]) -> str:
    """The SHA-256 of some files' contents, one after the other. It is computed once for each change of a file."""
    return _sha256(*((file, file.stat().st_mtime_ns) for file in files))


@cache
def _sha256(*files: tuple[Path, int]) -> str:
    return sha256_of(*(path for path, _ in files))


def is_here(source: str) -> bool:
    """Whether a file, a folder or a name on the hub can be opened without a network."""
    if Path(source).expanduser().exists():
        return bool(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):  # no name on the hub
        return isinstance(try_to_load_from_cache(source, "config.json"), str)
    return False


def find_file(source: str | os.PathLike, name: str) -> Path | None:
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
        transforms: Transforms of transformers that were used, for :func:`s2ft.model.checkpoint.saving_groups`.
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
