"""Write the merged checkpoint of an attached model, whole or spread over ranks. The model does not change."""

import logging
import os
from collections.abc import Container
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft.attached.active import coded_deltas, extra_values, mounted_deltas, write_changed_layers
from s2ft.attached.hooks import named_tensors
from s2ft.attached.record import Record, check_plain_and_untied, coupled_names, on_unwrapped, record_of
from s2ft.config import refuse
from s2ft.distributed import (
    all_ranks,
    decide,
    full_shape,
    full_values,
    is_partitioned,
    own_shards,
    reshard_all,
    run_on_first_rank,
    run_on_ranks,
)
from s2ft.export.streamed import (
    BaseSource,
    Changes,
    DiskSource,
    Sum,
    check_size,
    saved_names,
    temporary_folder,
    write_config,
    write_weights,
)
from s2ft.files.plain_text import check_output
from s2ft.model.checkpoint import (
    StoredWeights,
    conversions_of,
    is_of_transformers,
    open_checkpoint,
    read_from,
    saving_groups,
)
from s2ft.model.coupling import by_key
from s2ft.model.fingerprint import difference, fingerprint
from s2ft.model.weights import moving_tensors, restoring_moves

logger = logging.getLogger(__name__)

MERGE = "the checkpoint could not be loaded by it: call s2ft.merge, and save the state_dict"


@on_unwrapped
def save_merged(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write the active adapters and their base as a plain checkpoint of transformers. The model does not change.

    The checkpoint equals that of ``s2ft.merge(model).save_pretrained(directory)``, bit for bit, and no process has the
    whole model in its memory: weights are read from the base's checkpoint, changed and written one at a time. If there
    is no such checkpoint, they are gathered from the ranks one at a time.

    It works on models that FSDP2, ZeRO-3 or tensor parallelism has spread over ranks. Under torch.distributed every
    rank must call this. The first rank writes, and the others return when the files are complete. The tokenizer is not
    written: save it to the same folder afterwards.

    Args:
        model: Model of transformers with an active adapter.
        directory: Folder to write. It must not exist.
        base: The checkpoint that the base was loaded from: a folder, or a name on the hub. Weights outside the
            couplings are taken from it. Default: the one that the model's config names, if it is there and its weights
            are those of the model.
        max_shard_size: The largest file of weights, for example "2GB". Default: that of transformers.

    Raises:
        FileExistsError: The folder exists.
        FileNotFoundError: The folder that will hold it does not exist.
        ValueError: No adapter is active, the model is quantized or not one of transformers, or `base` has other
            weights.
        RuntimeError: Another rank failed or did not take part, or the files are not what was meant. Nothing is left.

    Example:
        >>> _ = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> s2ft.save_merged(model, "merged")
        >>> type(model).from_pretrained("merged").num_parameters()
        86336
    """
    record = record_of(model)
    _check(model, record, max_shard_size)
    reshard_all(model)
    plain, ranks, changes = _plain(model), all_ranks(), _changes(model, record)
    is_first = ranks is None or dist.get_rank() == ranks[0]
    found: list[DiskSource] = []  # from choose, whose result goes to other ranks as JSON

    def choose() -> str:
        check_output(Path(directory))  # before the base is read, which takes time
        return _why_no_base(base, model, record, plain, found)

    obstacle = decide("the base to merge into", is_first, choose).value

    def write(source: BaseSource, changes: Changes) -> None:
        with temporary_folder(Path(directory)) as folder:
            compare = write_weights(folder, plain, source, changes, max_shard_size)
            write_config(folder, plain)
            compare()

    if not obstacle:
        run_on_first_rank("saving a merged checkpoint", ranks, lambda: write(found[0], changes))
        return
    if is_first:
        logger.info("the base is gathered from the model to merge into it, because %s", obstacle)
    write_changed_layers(model, record)
    source = _ModelSource(model, record, plain)

    def write_gathered() -> None:
        try:
            if is_first:
                write(source, Changes(record.projections, {}))  # the weights hold them
        finally:  # every rank takes part in gathering all weights, also if the first one fails
            source.read_rest()

    run_on_ranks("saving a merged checkpoint", ranks, True, write_gathered)


def _check(model: nn.Module, record: Record, max_shard_size: int | str | None) -> None:
    """Raise ValueError if the adapters can't be merged."""
    refuse(
        (
            not is_of_transformers(model),
            f"save_merged writes checkpoints of transformers, and {type(model).__name__} is no model of it: call "
            "s2ft.merge, and save the state_dict",
        ),
        (not record.active, "no adapter is active, so there is nothing to merge: call s2ft.set_adapter first"),
    )
    if record.trainable in record.active:
        check_plain_and_untied(model, record, record.parts)
    if isinstance(max_shard_size, str):
        check_size(max_shard_size)


def _plain(model: Any) -> nn.Module:
    """A model of the same class and dtypes without adapters, on the meta device.

    Raises:
        ValueError: The model has other weights than the config makes, so the files would not be those of the model.
    """
    # FSDP2 derives a class
    own: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    with torch.device("meta"):
        plain = own._from_config(deepcopy(model.config), dtype=model.dtype)
    tensors = dict(named_tensors(model))
    known = {name for name in tensors if name.endswith(".s2")}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        found = _find(tensors, name)
        if found is None or full_shape(tensors[found]) != parameter.shape:
            raise ValueError(f"{name} was changed or removed since the config made the model, and {MERGE}")
        known.add(found)
        parameter.data = parameter.data.to(tensors[found].dtype)
    added = next((name for name, _ in model.named_parameters() if name not in known), None)
    if added is not None:
        raise ValueError(f"{added} was added to the model that the config makes, and {MERGE}")
    if model.can_generate():
        plain.generation_config = deepcopy(model.generation_config)
    return plain.eval()


def _find(tensors: Container[str], name: str) -> str | None:
    """The name of the tensor that has this name in the plain model; None if there is none."""
    layer, _, last = name.rpartition(".")
    # the last two: a replaced parameter, and a layer inside a layer
    return next((one for one in (name, f"{name}.weight", f"{layer}.linear.{last}") if one in tensors), None)


def _changes(model: nn.Module, record: Record) -> Changes:
    """What the active adapters change in the base. Every rank of a sharded model must call this."""
    deltas = {name: record.loaded[name].deltas for name in record.active if name != record.trainable}
    extra = {k: v for name in deltas for k, v in record.loaded[name].extra_weights.items()}
    if record.trainable in record.active:
        deltas[cast(str, record.trainable)] = coded_deltas(record, mounted_deltas(record))
        extra.update(extra_values(model, record))
    written = {
        name: weight for name, weight in record.active.items() if not (name == record.trainable and record.trains)
    }
    passes: dict[str, list[Sum]] = {
        path: [[(deltas[name][path], weight) for name, weight in written.items() if path in deltas[name]]]
        for path in dict.fromkeys(path for name in written for path in deltas[name])
    }
    if record.trains:  # merging writes it on top of what is written, as the forward adds it
        for path, delta in deltas[cast(str, record.trainable)].items():
            passes.setdefault(path, []).append([(delta, 1.0)])
    return Changes(record.projections, passes, extra)


# ---- the base on a disk --------------------------------------------------------------------------------


def _why_no_base(
    base: str | os.PathLike | None, model: nn.Module, record: Record, plain: nn.Module, found: list[DiskSource]
) -> str:
    """Open the base's checkpoint and check that it is that of the model.

    Args:
        base: The checkpoint that the user gave, if any.
        model: The attached model.
        record: Its record.
        plain: The plain model on the meta device.
        found: A list that gets the checkpoint's weights.

    Returns:
        Why there is no such checkpoint; empty if there is one.

    Raises:
        ValueError: The checkpoint that the user gave is of another base.
    """
    source = getattr(model.config, "_name_or_path", "") if base is None else base
    try:
        if not source:
            return "its config does not say where it was loaded from"
        weights = StoredWeights(plain, open_checkpoint(source))
        disk = DiskSource(weights)
        with read_from(plain, weights):
            other = difference(cast("dict[str, Any]", record.fingerprint), fingerprint(plain, record.couplings))
        other = other or _difference_outside(model, record, weights)
        if other:
            raise ValueError(f"{source} has other weights than the base of this model: {other}")
    except (OSError, ValueError) as error:  # no such files, others than the base's, or none that can be streamed
        if base is not None:
            raise
        return str(error)
    found.append(disk)
    return ""


def _difference_outside(model: nn.Module, record: Record, weights: StoredWeights) -> str:
    """Compare what this rank has of the tensors that the fingerprint leaves out. Returns the difference in words."""
    vectors = {vector.path for coupling in record.couplings for vector in coupling.vectors}
    changed = {*coupled_names(record.couplings) - vectors, *record.extra.base, *record.extra.overwritten}
    done = [(move.coupling, move.order) for move in record.moves if move.is_done]
    moved = by_key((id(one.tensor), one) for move in done for one in moving_tensors(model, *move))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # buffers too: running statistics change
        if name in changed or tensor.is_meta or name not in weights:
            continue
        stored = weights.read(name)
        for one in moved.get(id(tensor), ()):
            one.permute(stored)
        stored = stored.flatten(2) if is_partitioned(tensor) and stored.dim() > 2 else stored  # as its blocks are cut
        if not all(torch.equal(shard.tensor.cpu(), shard.cut(stored)) for shard in own_shards(tensor)):
            return f"{name} differs"
    return ""


# ---- the base in the model -----------------------------------------------------------------------------


class _ModelSource(BaseSource):
    """The weights of a base in an attached model.

    A base that was made in this process, or changed after it was loaded, is in no checkpoint, and no rank may have room
    for all of it. So it can't be merged from a file, as all other bases are. The writer and the check are the same.

    A weight that is spread over ranks is gathered when it is read. So every rank reads all weights in the same order:
    the first one reads them as it writes, the others by :meth:`read_rest`.
    """

    def __init__(self, model: nn.Module, record: Record, plain: nn.Module) -> None:
        self.transforms = conversions_of(model)
        self._tensors = dict(named_tensors(model))
        groups = saving_groups(plain, self.transforms, saved_names(plain))
        self._rest = [name for group in groups for name, _ in group.sources]
        self._moves = restoring_moves(model, record.moves)

    def values(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        if self._rest.pop(0) != name:
            raise RuntimeError("weights must be read in one order on all ranks")
        tensor = self._tensors[cast(str, _find(self._tensors, name))]
        with full_values(tensor) as full:
            values = full.to("cpu", copy=True)
        for moving in self._moves.get(id(tensor), ()):
            moving.permute(values)
        return values

    def read_rest(self) -> None:
        """Take part in gathering all weights that this rank has not read yet."""
        for name in list(self._rest):
            self._read(name)
