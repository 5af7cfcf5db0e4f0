"""Write the checkpoint of a merged model one weight at a time. No process ever has the whole model in its memory.

The weights are read from the base's checkpoint, or gathered from the ranks of a model. The changed rows and columns
are added by the op that merges in memory, so the result is the same bit for bit. Tensors that do not change are copied
in pieces. A plain model on the meta device says which weights there are and how transformers stores them.
"""

import fcntl
import glob
import inspect
import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor, nn

from s2ft.files.plain_text import check_output
from s2ft.files.reading import StoredTensor, checksum, lay_out
from s2ft.foreign import read
from s2ft.model.checkpoint import INDEX, CannotStream, Group, StoredWeights, open_checkpoint, saving_groups, tied_names
from s2ft.model.coupling import Projection, by_key
from s2ft.model.weights import Delta, WeightHandle, weight_at
from s2ft.ops import scatter_add_

Sum = list[tuple[Delta, float]]  # deltas of one projection with their weights: they are added in one pass


@dataclass
class Changes:
    """What merging changes in a base.

    Attributes:
        projections: The projections that change, by name.
        passes: Sums of deltas, by projection. They are added to the weight one after the other.
        extra: New values of weights outside the couplings, by name.
    """

    projections: dict[str, Projection]
    passes: dict[str, list[Sum]]
    extra: dict[str, Tensor] = field(default_factory=dict)


class BaseSource(ABC):
    """Where the weights of the base are.

    Attributes:
        transforms: Transforms of transformers that were used to load the base; None if there was no checkpoint.
    """

    transforms: list | None

    def __contains__(self, name: str) -> bool:
        return True

    @abstractmethod
    def values(self, names: list[str]) -> dict[str, Tensor]:
        """Read weights by name, each into memory of its own."""

    def copies(self, group: Group) -> dict[str, StoredTensor] | None:
        """The tensors in files that hold what a group makes, if it only copies; else None."""
        return None

    def others(self) -> dict[str, StoredTensor]:
        """Tensors of the base's files that belong to no weight of the model. The new checkpoint has them too."""
        return {}


class DiskSource(BaseSource):
    """The weights of a base in its checkpoint."""

    def __init__(self, weights: StoredWeights) -> None:
        """Use these weights.

        Raises:
            CannotStream: Two weights are one in the model and have different values in the checkpoint.
        """
        self.weights, self.transforms = weights, weights.transforms
        for names in tied_names(weights.model):
            stored = [self._plain(name) for name in names if name in weights and weights.name(name) == name]
            if len(stored) > 1 and (None in stored or len({(one.dtype, one.checksum()) for one in stored if one}) > 1):
                raise CannotStream(f"{' and '.join(names)} are one weight by its config and differ in the checkpoint")

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def _plain(self, name: str) -> StoredTensor | None:
        """The tensor that holds a weight as it is; None if the weight is converted."""
        group = self.weights.group(name)
        return None if group.transform else self.weights.checkpoint.tensors[group.sources[0][0]]

    def values(self, names: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            if name not in found:  # a group may make several of them
                made = self.weights.read_group(self.weights.group(name))
                found.update({one: made[self.weights.name(one)] for one in names if self.weights.name(one) in made})
        return found

    def copies(self, group: Group) -> dict[str, StoredTensor] | None:
        names = [name for name, _ in group.sources]
        if group.transform is None:
            stored = self._plain(names[0])
            return None if stored is None else {group.name: stored}
        files = self.weights.checkpoint.tensors
        parts = {part for name in names for part, _ in self.weights.group(name).sources}
        same = parts == group.made.keys() and all(files[name].shape == group.made[name].shape for name in parts)
        return {name: files[name] for name in parts} if same else None

    def others(self) -> dict[str, StoredTensor]:
        return {name: self.weights.checkpoint.tensors[name] for name in self.weights.unused}


class MergedWeights:
    """The weights of a base with changes, which are made when a weight is read."""

    def __init__(self, model: nn.Module, source: BaseSource, changes: Changes) -> None:
        """Find the weights that change.

        Args:
            model: The plain model on the meta device.
            source: Its weights.
            changes: The changes.
        """
        self.source = source
        self.state = model.state_dict(keep_vars=True)
        handles = {name: weight_at(model, changes.projections[name]) for name in changes.passes}
        self._deltas: dict[int, list[tuple[WeightHandle, int, list[Sum]]]] = by_key(
            (id(handles[name].tensor), (handles[name], changes.projections[name].dim, passes))
            for name, passes in changes.passes.items()
        )
        self._extra = {id(self.state[name]): value for name, value in changes.extra.items()}

    def __contains__(self, name: str) -> bool:
        """Whether the base has this weight, or a change replaces it."""
        return name in self.source or id(self.state[name]) in self._extra

    def changes(self, name: str) -> bool:
        """Whether a weight changes."""
        return id(self.state[name]) in self._deltas or id(self.state[name]) in self._extra

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The changed weights by name, in memory of their own."""
        found = self.source.values([name for name in names if id(self.state[name]) not in self._extra])
        for name, values in found.items():
            for handle, dim, passes in self._deltas.get(id(self.state[name]), ()):
                found[name] = values = values.contiguous()
                for deltas in passes:
                    index, added = ([getattr(delta, part).cpu() for delta, _ in deltas] for part in ("index", "values"))
                    scatter_add_(handle.view(values), index, added, dim, [weight for _, weight in deltas])
        for name in names:
            if name not in found:
                found[name] = self._extra[id(self.state[name])].to("cpu", self.state[name].dtype)
        return found


def saved_names(model: nn.Module) -> list[str]:
    """The names of the weights that `save_pretrained` of transformers writes: a tied weight has one of its names."""
    state = model.state_dict()
    for name in read(model, "_keys_to_ignore_on_save", "transformers", "weights that are not saved") or ():
        state.pop(name, None)
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    return list(remove_tied_weights_from_state_dict(state, cast(Any, model)))


def write_weights(
    folder: Path, model: nn.Module, source: BaseSource, changes: Changes, max_shard_size: int | str | None = None
) -> Callable[[], None]:
    """Write the files of a merged model's weights.

    Args:
        folder: An empty folder.
        model: The plain model on the meta device, with the dtypes to write.
        source: The base's weights.
        changes: What merging changes.
        max_shard_size: Size of a file, for example "2GB". Default: that of transformers.

    Returns:
        A function that reads the files again and compares every tensor. It raises RuntimeError if one differs.

    Raises:
        CannotStream: transformers can't convert these weights one at a time. Nothing is written.
    """
    merged, names = MergedWeights(model, source, changes), saved_names(model)
    lost = next((name for name in names if name not in merged), None)
    if lost is not None:
        raise CannotStream(f"{lost} is not in the base's checkpoint")
    groups = saving_groups(model, source.transforms, names)
    made = {name: tensor for group in groups for name, tensor in group.made.items()}
    others = {name: stored for name, stored in source.others().items() if name not in made}
    made.update({name: stored.empty() for name, stored in others.items()})
    places = _lay_out_all(folder, model, made, max_shard_size)
    written: dict[str, int] = {name: places[name].write(stored.pieces()) for name, stored in others.items()}
    converted: dict[str, int] = {}
    for group in groups:
        names = [name for name, _ in group.sources]
        copies = None if any(merged.changes(name) for name in names) else source.copies(group)
        if copies is not None:
            written.update({name: places[name].write(stored.pieces()) for name, stored in copies.items()})
            continue
        values = merged.read(names)
        if group.transform is not None:
            converted.update({name: checksum(value) for name, value in values.items()})
        for name, value in group.convert(model, values.pop).items():
            written[name] = places[name].write([value])
    return lambda: _compare(folder, model, groups, written, converted)


def _lay_out_all(
    folder: Path, model: nn.Module, made: dict[str, Tensor], max_shard_size: int | str | None
) -> dict[str, StoredTensor]:
    """Create the files of a checkpoint and, if there are several, their index. Returns the place of each tensor."""
    from huggingface_hub import split_torch_state_dict_into_shards

    # a piece of a larger tensor would count with all of it
    fresh = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in made.items()}
    from transformers import PreTrainedModel

    usual = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    split = split_torch_state_dict_into_shards(
        fresh, max_shard_size=usual if max_shard_size is None else max_shard_size
    )
    places = {
        name: place
        for file, names in split.filename_to_tensors.items()
        for name, place in lay_out(folder / file, {name: fresh[name] for name in names}).items()
    }
    if split.is_sharded:
        count = sum(parameter.numel() for parameter in model.parameters())
        index = {"metadata": {"total_parameters": count, **split.metadata}, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return places


def _compare(
    folder: Path, model: nn.Module, groups: list[Group], written: dict[str, int], converted: dict[str, int]
) -> None:
    """Read a checkpoint and compare it with what was meant.

    Args:
        folder: Folder of the checkpoint.
        model: The plain model on the meta device.
        groups: How its tensors were made.
        written: Sums of the tensors that were written, by name.
        converted: Sums of the weights that were converted before, by name.

    Raises:
        RuntimeError: A tensor differs, or transformers would load it as another weight.
    """
    found = open_checkpoint(folder)
    weights = StoredWeights(model, found)
    different = sorted(found.tensors.keys() ^ written.keys()) or [
        name for name, total in written.items() if found.tensors[name].checksum() != total
    ]
    different += [name for name in model.state_dict() if name not in weights]
    for group in groups:
        if group.transform is None:
            name = group.sources[0][0]
            different += [] if [part for part, _ in weights.group(name).sources] == [group.name] else [name]
    different += [name for name, total in converted.items() if checksum(weights.read(name)) != total]
    if different:
        raise RuntimeError(f"the saved checkpoint is not the merged model: {', '.join(different[:5])} differ")


def give_generation_config(model: Any, source: str) -> None:
    """Give a model on the meta device the generation settings that its base has, as `from_pretrained` does.

    Args:
        model: The model.
        source: Folder or name of the base.
    """
    from transformers import GenerationConfig

    with suppress(OSError):  # it may have none: those of the model's config hold then
        if model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(source)


def write_config(folder: Path, model: Any) -> None:
    """Write the config and the generation settings of a model, as `save_pretrained` writes them."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if getattr(model, "_auto_class", None) is not None:  # its code comes with the base
        from transformers.dynamic_module_utils import custom_object_save

        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


# ---- the output ------------------------------------------------------------------------------------------


def check_size(size: str) -> None:
    """Raise ValueError unless the text is a size above 0, such as 2GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?[KMGT]B", size.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"max_shard_size must be a size above 0, such as 2GB, got {size!r}")


@contextmanager
def temporary_folder(output: str | Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `output` at the end, see :func:`temporary_place`."""
    with temporary_place(output) as folder:
        folder.mkdir()
        yield folder


@contextmanager
def temporary_place(output: str | Path) -> Iterator[Path]:
    """Yield the path of a file or folder to make, which is renamed to `output` at the end, or removed on an exception.

    A process that is killed leaves a hidden folder behind; the next one that makes the same output removes it.

    Raises:
        FileExistsError: The output exists.
        FileNotFoundError: The folder that will hold the output does not exist.
    """
    output = Path(output)
    check_output(output)
    parent, prefix = output.absolute().parent, f".{output.name}.s2ft-"
    with ExitStack() as locks:
        with _locked(parent):  # so that no other process takes the new folder for an abandoned one
            for old in parent.glob(f"{glob.escape(prefix)}*"):
                with suppress(OSError), _locked(old, at_once=True):  # its process has ended
                    shutil.rmtree(old, ignore_errors=True)
            folder = parent / f"{prefix}{uuid4().hex}"
            folder.mkdir()
            locks.enter_context(_locked(folder))
        try:
            yield folder / output.name
            os.rename(folder / output.name, output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, at_once: bool = False) -> Iterator[None]:
    """Lock a folder, where its file system can do this. With `at_once`, raise OSError unless nobody holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with nullcontext() if at_once else suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if at_once else 0))
        yield
    finally:
        os.close(descriptor)
