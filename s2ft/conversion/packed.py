"""An adapter merged into the blocks of a quantized file or folder, in a new one or, for a file, in place.

The new file has the base's bytes everywhere else. Its metadata names the base with its hash, and the adapter.

Where a file is changed in place, a file beside it keeps the old bytes of the blocks. It is complete on the disk and has
the name :data:`PATCHED` before the first block is written, and another name after the last one is back. So whatever
interrupts a change, the old bytes can be put back; and the next switch to the same adapter computes nothing.
"""

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape
from itertools import count
from pathlib import Path
from traceback import clear_frames
from typing import Any, BinaryIO, TypeVar

import numpy
import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

import s2ft
from s2ft.attached.record import Record, check_fits, new_record
from s2ft.codecs.codec import Codec
from s2ft.codecs.gguf_file import GgufFile
from s2ft.codecs.packed_folder import PackedFolder
from s2ft.conversion import ollama
from s2ft.export.streamed import temporary_folder, temporary_place
from s2ft.files.plain_text import check_output, replace_file, sha256_of
from s2ft.files.reading import MAX_TENSORS, PATCHED, PIECE, as_bytes, check_finite, local_folder, read_bytes, read_json
from s2ft.model.checkpoint import hash_of_files, packed_base
from s2ft.model.coupling import by_key
from s2ft.model.fingerprint import TOLERANCE, covered, sampled
from s2ft.model.weights import Delta
from s2ft.text.adapter_prompts import give_prompt, recorded_format, standalone_template
from s2ft.text.models import hollow_model, load_tokenizer, locate
from s2ft.text.prompts import PromptFormat

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
STRING = 8  # type of a value in the metadata of GGUF
TEMPLATE = "tokenizer.chat_template"  # its key in the metadata of GGUF
MERGED = "s2ft_merged.json"  # in a folder, for each merge: the base, the sha256 of its files, and the adapter


@dataclass
class Change:
    """New blocks of one weight.

    Attributes:
        start: Position of the weight in the file.
        row_bytes: Bytes from one row of the weight to the next.
        rows: Rows of the weight in the file, [rows] int64.
        blocks: Blocks of bytes in each of the rows, [blocks] int64.
        old: Their bytes in the base, [rows, blocks, bytes of a block].
        new: Their new bytes.
    """

    start: int
    row_bytes: int
    rows: numpy.ndarray
    blocks: numpy.ndarray
    old: numpy.ndarray
    new: numpy.ndarray

    def read(self, data: numpy.ndarray) -> numpy.ndarray:
        """Copy these blocks out of a file's bytes [bytes] uint8."""
        return self._weight(data)[numpy.ix_(self.rows, self.blocks)]

    def write(self, data: numpy.ndarray, content: numpy.ndarray) -> None:
        """Write these blocks into a file's bytes."""
        self._weight(data)[numpy.ix_(self.rows, self.blocks)] = content

    def _weight(self, data: numpy.ndarray) -> numpy.ndarray:
        rows, size = int(self.rows.max()) + 1, self.new.shape[-1]
        return data[self.start : self.start + rows * self.row_bytes].reshape(rows, self.row_bytes // size, size)


def merged_paths(base: GgufFile | PackedFolder, adapter: s2ft.Adapter) -> dict[str, str]:
    """Check that an adapter is of a base, whose weights have codecs. Returns the module's path of each delta by name.

    Raises:
        ValueError: The adapter can't be merged into the base.
    """
    model = hollow_model(str(base.path))
    record = new_record(model, adapter.couplings)
    check_fits(adapter, model, record)  # the model has no values: the next line compares the base
    _check_base(base, adapter, model, record)
    if adapter.extra_weights:
        raise ValueError(
            f"adapter {adapter.name!r} trains {next(iter(adapter.extra_weights))} in full, which has no place in the "
            "blocks: --dtype writes plain weights, where the base is of compressed-tensors"
        )
    for name, delta in adapter.deltas.items():
        projection = record.projections[name]
        if projection.size is not None or projection.expert is not None:
            raise ValueError(f"{name} shares its weight with other projections, which a file can't be patched for")
        base.codec(projection.path)  # raises if there is none
        check_finite(f"the delta of {name}", delta.values)
    return {name: record.projections[name].path for name in adapter.deltas}


def _check_base(base: GgufFile | PackedFolder, adapter: s2ft.Adapter, model: torch.nn.Module, record: Record) -> None:
    """Compare values of every weight with those in the adapter's fingerprint, and the hash of a file."""
    samples = by_key(  # by layer: names of weights, each with a value
        (layer, (f"{projection.path}.{part}", value))
        for layer, projection, handle in covered(model, record.couplings)
        for part, tensor in (("weight", handle.tensor), ("bias", handle.bias))
        if tensor is not None
        for value in base.elements(projection.path, part, tensor.shape, sampled(tensor.numel()))
    )
    ours = {layer: {"digest": "", "samples": [value for _, value in found]} for layer, found in samples.items()}
    prints, different = {**adapter.fingerprint, "dtype": "of the base"}, ""
    try:  # no dtypes have these names: samples are compared; both are of files, so nothing but rounding may differ
        replace(adapter, fingerprint=prints).check_base({"dtype": "of a file", "layers": ours})
    except ValueError as error:
        names = (
            name
            for layer, theirs in adapter.fingerprint["layers"].items()
            for (name, value), other in zip(samples.get(layer, ()), theirs["samples"])
            if not math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=1e-8)
        )
        different = f"{error}" + next((f"; the first weight is {name}" for name in names), "")
    trained_on = adapter.info.get("base_sha256")
    if trained_on is not None:
        # of a GGUF file, the bytes without an adapter that is in it
        found = (
            hashlib.sha256(base.reader.data).hexdigest() if isinstance(base, GgufFile) else hash_of_files(base.files)
        )
        if found != trained_on:
            different = different or f"adapter {adapter.name!r} was trained on another base"
            different += f". Its base has the sha256 {trained_on}, and {base.path.name} has {found}"
    if different:
        raise ValueError(different)


class Arrived:
    """How much of an adapter's update is in packed weights. What is below half a step of a block gets lost."""

    LITTLE = 0.5  # a smaller share is warned of

    def __init__(self) -> None:
        self.along = self.wanted = 0.0  # sums of squares: of what has changed along the update, and of the update

    def add(self, codec: Codec, old: Any, new: Any, index: Tensor, delta: Delta) -> None:
        """Count one weight.

        Args:
            codec: The codec of the weight.
            old: The packed matrix before.
            new: The packed matrix with the delta.
            index: The rows or columns of the delta in it.
            delta: The delta.
        """
        before, after = (codec.values(codec.unpack(one).take(index, delta.dim)).double() for one in (old, new))
        self.along += float(((after - before) * delta.values.double()).sum())
        self.wanted += float(delta.values.double().square().sum())

    @property
    def share(self) -> float:
        """The share of the update, along the update."""
        return self.along / self.wanted if self.wanted else 1.0

    def told(self, name: str) -> str:
        """Say how much has arrived, and warn if it is little.

        Args:
            name: The file or the folder.
        """
        if self.share < self.LITTLE:
            logger.warning(
                "warning: %s holds %.0f%% of the update, and may answer as the base: most of it is less than half a "
                "step of the blocks. s2ft sft --codec auto trains what they can hold; if this adapter was trained so, "
                "take a higher --learning-rate or more --epochs",
                name,
                100 * self.share,
            )
        return f"{self.share:.0%} of the update is in it"


def new_blocks(
    file: GgufFile, adapter: s2ft.Adapter, paths: dict[str, str], arrived: Arrived | None = None
) -> Iterator[Change]:
    """Make the new blocks of one weight of a file after the other, given :func:`merged_paths`.

    Args:
        file: The base.
        adapter: The adapter.
        paths: Paths of modules by the names of deltas.
        arrived: Counts how much of the update is in the blocks.
    """
    for name, path in paths.items():
        delta, tensor, codec = adapter.deltas[name], file.tensors[file.name(path)], file.codec(path)
        part = file.part(path, delta.index, delta.dim)
        old = part.packed.flatten(-2)
        new = codec.added(old, part.index, delta.dim, delta.values)
        if arrived is not None:
            arrived.add(codec, old, new, part.index, delta)
        bytes_of = (one.numpy() for one in (part.rows, part.blocks, part.packed, new.view(part.packed.shape)))
        yield Change(int(tensor.data_offset), tensor.data.strides[0], *bytes_of)


def export(model_name: str, adapter: str | Path, output: str | Path) -> str:
    """Merge an adapter into a packed base. It is copied in pieces, and only the blocks of trained units change.

    Args:
        model_name: The adapter's base: a .gguf file, or a checkpoint of compressed-tensors or in NF4.
        adapter: The adapter's folder, or the output folder of a run.
        output: The file or the folder to write; it must not exist.

    Returns:
        A sentence about the output. A GGUF file gets the chat template of the training, and a Modelfile beside it.

    Raises:
        FileExistsError: The output exists.
        FileNotFoundError: The base or the adapter does not exist.
        ValueError: The base has no codec, it is not that of the adapter, or a weight's type has no codec. Nothing is
            left in any of these cases.
    """
    output = Path(output)
    check_output(output)  # before the files are read
    if output.suffix != ".gguf":
        return _export_folder(model_name, s2ft.read_adapter(adapter), output)
    beside = output.with_suffix(f".{ollama.MODELFILE}")
    check_output(beside)
    path, saved = gguf_path(model_name), s2ft.read_adapter(adapter)
    base, kept = GgufFile(path), Kept.of(path)
    if kept:
        raise ValueError(f"{path} has adapter {kept.adapter!r} in place: s2ft patch {path} --undo first")
    form, template, turn = recorded_format(saved.info) or PromptFormat(), _new_template(base, saved), None
    if template is not None:
        end = base.value("eos_token_id", "tokenizer.ggml.")
        turn = ollama.turn(form, None if end is None else base.reader.fields["tokenizer.ggml.tokens"].contents(end))
    modelfile = ollama.modelfile(None, [], form, f"./{output.name}", turn)
    paths = merged_paths(base, saved)
    with temporary_place(output) as temporary:
        with open(temporary, "xb") as file:
            shift = _copy(base, file, {"base": path.name, "adapter": saved.name}, template)
        data = numpy.memmap(temporary, numpy.uint8, "r+")
        changed, blocks, arrived = 0, 0, Arrived()
        for change in new_blocks(base, saved, paths, arrived):
            change.start += shift
            changed += int((change.old != change.new).sum())
            blocks += change.rows.size * change.blocks.size
            change.write(data, change.new)
        data.flush()
        start = int(base.reader.data_offset)
        if _different(base.reader.data[start:], data[start + shift :]) != changed:
            raise RuntimeError(f"{output} is not the base with the adapter: other bytes have changed too")
        GgufFile(temporary)  # an error says what is wrong
        replace_file(beside, modelfile.encode())
    return (
        f"{output}: {changed:,} bytes in {blocks:,} blocks of {len(paths)} weights have changed, and no other "
        f"byte of a weight; read again and compared\n{arrived.told(output.name)}\n"
        f"for Ollama: ollama create {output.stem} -f {beside}"
    )


def _new_template(base: GgufFile, adapter: s2ft.Adapter) -> str | None:
    """The chat template of an adapter's training; None if the file has the same, or the training had none."""
    form = recorded_format(adapter.info)
    template = None if form is None else standalone_template(form)
    return None if template == base.value(TEMPLATE, "") else template


def _packed_folder(model_name: str) -> PackedFolder:
    base = packed_base(model_name)
    if not isinstance(base, PackedFolder):
        raise ValueError(
            f"{model_name} is no checkpoint of compressed-tensors or in NF4; the output of a GGUF file ends in .gguf"
        )
    return base


def _export_folder(model_name: str, adapter: s2ft.Adapter, output: Path) -> str:
    base = _packed_folder(model_name)
    paths, changed, source, arrived = merged_paths(base, adapter), 0, base.path, Arrived()
    if not Path(model_name).expanduser().is_dir():  # the cache of the hub may have some of its files only
        source = Path(snapshot_download(model_name))
    if source.resolve() in output.resolve().parents:
        raise ValueError(f"output {output} is inside the base's folder, which is copied: choose another place")
    with temporary_folder(output) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for copied in (folder, *folder.rglob("*")):
            copied.chmod(copied.stat().st_mode | 0o200)  # the base may be read-only
        if recorded_format(adapter.info) is not None:
            tokenizer = load_tokenizer(str(source))
            template = tokenizer.chat_template
            if give_prompt(tokenizer, adapter.info, f"adapter {adapter.name!r}").chat_template != template:
                tokenizer.save_pretrained(folder)
        for name, path in paths.items():
            for tensor, (old, new) in _changed(base, path, adapter.deltas[name], arrived).items():
                changed += int((as_bytes(old) != as_bytes(new)).sum())
                place = base.tensors[tensor]
                replace(place, file=folder / place.file.name).write([new])
        pairs = [
            [numpy.memmap(where / file.name, numpy.uint8, "r") for where in (file.parent, folder)]
            for file in base.files
        ]
        if sum(_different(*pair) for pair in pairs) != changed:
            raise RuntimeError(f"{output} is not the base with the adapter: other bytes have changed too")
        merges = read_json(folder / MERGED) if (folder / MERGED).exists() else []
        hashes = {file.name: sha256_of(file) for file in base.files}
        merges.append({"base": model_name, "adapter": adapter.name, "sha256": hashes})
        (folder / MERGED).write_text(json.dumps(merges, indent=2) + "\n", encoding="utf-8")
    return (
        f"{output}: {changed:,} bytes of {len(paths)} weights have changed, and no other byte of a weight; read "
        f"again and compared\n{arrived.told(output.name)}"
    )


def _changed(
    base: PackedFolder, path: str, delta: Delta, arrived: Arrived | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of a packed weight that a delta changes, before and after, by their names in the files."""
    old = base.packed(path)
    codec = base.codec(path, old)
    new = codec.added(old, delta.index, delta.dim, delta.values)
    if arrived is not None:
        arrived.add(codec, old, new, delta.index, delta)
    return {base.name(path, part): (old[part], new[part]) for part in new if new[part] is not old[part]}


def tuned_weights(model_name: str, adapter: str | Path | s2ft.Adapter) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the packed weights of a checkpoint with an adapter merged, for an engine that serves the checkpoint.

    Engines join weights of one module and pack them in their own way. So each module with a trained weight is given
    whole: the tensors of its weights, by their names in the checkpoint. The others stay as they are.

    Args:
        model_name: The adapter's base, a checkpoint of compressed-tensors or in NF4.
        adapter: The adapter, its folder, or the output folder of a run.

    Yields:
        The name and the new content of a tensor.

    Raises:
        ValueError: The base has no codec, or it is not that of the adapter.

    Example:
        >>> from s2ft.conversion.packed import tuned_weights
        >>> weights = tuned_weights("llama-w4a16", "tuned")
        >>> # vLLM in this process: llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    """
    saved = adapter if isinstance(adapter, s2ft.Adapter) else s2ft.read_adapter(adapter)
    base = _packed_folder(model_name)
    deltas = ((path, saved.deltas[name]) for name, path in merged_paths(base, saved).items())
    for module, trained in by_key((path.rpartition(".")[0], (path, delta)) for path, delta in deltas).items():
        new = {name: pair[1] for path, delta in trained for name, pair in _changed(base, path, delta).items()}
        for name in (name for name in base.tensors if name.startswith(f"{module}.")):
            yield name, new[name] if name in new else base.tensors[name].read()


def _different(one: numpy.ndarray, other: numpy.ndarray) -> int:
    """The number of bytes that differ."""
    pieces = range(0, len(one), PIECE)
    return sum(int((one[first : first + PIECE] != other[first : first + PIECE]).sum()) for first in pieces)


def gguf_path(model_name: str) -> Path:
    """The GGUF file of a model's name. Raises ValueError if it is none."""
    folder, options = locate(model_name)
    if not options:
        raise ValueError(f"{model_name} is no .gguf file: s2ft export --format gguf makes one of a checkpoint")
    return Path(folder) / options["gguf_file"]


def _copy(base: GgufFile, file: BinaryIO, values: dict[str, str], template: str | None) -> int:
    """Copy a GGUF file with more strings in its metadata, the sha256 of the base, and another chat template or None.

    Returns how far data moves.
    """
    reader, data = base.reader, base.reader.data
    number = next(one for one in count() if f"s2ft.merged.{one}.base" not in reader.fields)  # merges before this one
    values = {f"s2ft.merged.{number}.{key}": text for key, text in {**values, "sha256": sha256_of(base.path)}.items()}
    values |= {} if template is None else {TEMPLATE: template}
    old = [reader.fields[key] for key in values if key in reader.fields]
    first, last = (tensor.field for tensor in (reader.tensors[0], reader.tensors[-1]))
    metadata = bytearray(data[: first.offset])
    for field in old:  # the template alone
        del metadata[field.offset : field.offset + sum(part.nbytes for part in field.parts)]
    for key, text in values.items():
        metadata += _string(key) + STRING.to_bytes(4, "little") + _string(text)
    metadata[16:24] = (int(reader.fields["GGUF.kv_count"].parts[0][0]) + len(values) - len(old)).to_bytes(8, "little")
    head = bytes(metadata) + data[first.offset : last.offset + sum(part.nbytes for part in last.parts)].tobytes()
    head += b"\0" * (-len(head) % int(reader.alignment))
    file.write(head)
    for place in range(int(reader.data_offset), len(data), PIECE):
        file.write(data[place : place + PIECE])
    os.fsync(file.fileno())
    return len(head) - int(reader.data_offset)


def _string(text: str) -> bytes:
    content = text.encode()
    return len(content).to_bytes(8, "little") + content


# ---- an adapter in the blocks of a file in place, and the file as it was --------------------------------------------


PARTS = ("rows", "blocks", "old", "new")  # of a change in that file
CHECKSUM = "sha256"  # of everything else in that file


@dataclass
class Kept:
    """The old and the new bytes of the blocks that an adapter changes in a file.

    Attributes:
        path: The file.
        changes: The changes.
        adapter: Name of the adapter.
        digest: Hash of its files.
    """

    path: Path
    changes: list[Change]
    adapter: str
    digest: str

    @classmethod
    def of(cls, path: Path, beside: Path | None = None) -> "Kept | None":
        """Read what is kept of a file; None if it is not patched.

        Args:
            path: The file.
            beside: The file with the old bytes. Default: that of the adapter in the file. :func:`_earlier` gives that
                of an adapter that was in it before.

        Raises:
            ValueError: The file with the old bytes is damaged.
        """
        path = path.resolve()  # a link to a file has none beside it
        beside = beside or path.with_name(path.name + PATCHED)
        if not beside.exists():
            return None
        try:
            found = load(read_bytes(beside, MAX_TENSORS))
            if found.pop(CHECKSUM).tobytes() != _checksum(found):
                raise ValueError("its bytes are not those that were written")
            changes = [
                Change(*place, *(found[f"{number}.{part}"] for part in PARTS))
                for number, place in enumerate(found["places"].tolist())
            ]
            return cls(path, changes, *(bytes(found[name]).decode() for name in ("adapter", "digest")))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{beside} is truncated or damaged: {error}") from None

    def save_blocks(self) -> None:
        """Write the file beside, in one step and as one of an earlier switch, unless there is one."""
        earlier = _earlier(self.path, self.digest)
        if not earlier.exists():
            tensors = {
                "adapter": numpy.frombuffer(self.adapter.encode(), numpy.uint8),
                "digest": numpy.frombuffer(self.digest.encode(), numpy.uint8),
                "places": numpy.array([(change.start, change.row_bytes) for change in self.changes]),
            }
            for number, change in enumerate(self.changes):
                tensors |= {f"{number}.{part}": numpy.ascontiguousarray(getattr(change, part)) for part in PARTS}
            tensors[CHECKSUM] = numpy.frombuffer(_checksum(tensors), numpy.uint8)
            replace_file(earlier, save(tensors))
            os.utime(earlier, ns=2 * (self.path.stat().st_mtime_ns,))  # the file's own time, see _in_file

    def is_whole(self, data: numpy.ndarray) -> bool:
        """Whether all of the new bytes are in the file.

        Raises:
            ValueError: The file has bytes that are neither the old nor the new ones.
        """
        whole = True
        for change in self.changes:
            try:
                now = change.read(data)
            except (IndexError, ValueError):  # the file is smaller
                now = ~change.new
            is_new = now == change.new
            if not (is_new | (now == change.old)).all():
                raise ValueError(
                    f"{self.path} is not the file that was patched: it was replaced or changed since. Delete "
                    f"{self.path.name}{PATCHED} to keep it as it is"
                )
            whole &= bool(is_new.all())
        return whole

    def put_back(self, data: numpy.ndarray) -> None:
        """Write the old bytes into those of the file, for which :meth:`is_whole` raised nothing."""
        for change in self.changes:
            change.write(data, change.old)

    def rename(self, is_in_file: bool) -> None:
        """Give the file beside the name that says whether the adapter is in the file, maybe in part."""
        names = [_earlier(self.path, self.digest), self.path.with_name(self.path.name + PATCHED)]
        os.replace(*(names if is_in_file else reversed(names)))
        _synchronize(self.path.parent)


def _checksum(tensors: dict[str, numpy.ndarray]) -> bytes:
    """The SHA-256 of the names, types, shapes and values of tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        found.update(numpy.ascontiguousarray(tensor).data)
    return found.digest()


def _earlier(path: Path, digest: str) -> Path:
    return path.with_name(f"{path.name}.s2ft-blocks-{digest[:16]}")


def patch(file: str | Path, adapter: str | Path) -> str:
    """Write an adapter into a GGUF file in place, in the place of another one if the file has one.

    The first time the blocks are computed. They are kept beside the file, so that each later switch to the adapter
    writes them and nothing else.

    Args:
        file: The adapter's base, a .gguf file.
        adapter: The adapter's folder, or the output folder of a run.

    Returns:
        A sentence about what has changed.

    Raises:
        FileNotFoundError: The file or the adapter does not exist.
        PermissionError: The file can't be written.
        ValueError: The file is not the adapter's base, a weight's type has no codec, or another program uses the file.
            Nothing has changed in any of these cases.
    """
    path, folder = gguf_path(str(file)), local_folder(adapter)
    if path.is_symlink() or path.stat().st_nlink > 1:  # the bytes beside one name would not be found by the others
        raise ValueError(f"{path} is one of several names of a file: copy it, and patch the copy")
    digest = _digest(folder)

    def write(data: numpy.memmap, flush: Callable[[numpy.memmap], None]) -> Kept:
        before = Kept.of(path)
        base = numpy.memmap(path, numpy.uint8, "c")  # as it is without the adapter, in this process alone
        if before is not None:
            before.is_whole(data)  # raises for another file
            before.put_back(base)
        known = before if before is not None and before.digest == digest else _of_earlier_switch(path, digest, base)
        made = known or _computed(path, folder, digest, before)
        if made is not before:
            made.save_blocks()  # all that needs room on the disk, before anything changes
            if before is not None:
                _undo(before, data, flush)
            made.rename(is_in_file=True)
        for change in made.changes:
            change.write(data, change.new)
        flush(data)
        return made

    made = _in_file(path, write)
    size = sum(change.new.nbytes for change in made.changes)
    return f"{path}: {size:,} bytes are those of adapter {made.adapter!r}; s2ft patch --undo puts the base's back"


def _of_earlier_switch(path: Path, digest: str, base: numpy.ndarray) -> Kept | None:
    """What an earlier switch to an adapter has left; None if there is nothing, or it is damaged or of another base.

    Also None if another program has changed the file since the last switch, see :func:`_in_file`.
    """
    earlier = _earlier(path, digest)
    with suppress(ValueError, IndexError, FileNotFoundError):
        kept = Kept.of(path, earlier) if earlier.stat().st_mtime_ns == path.stat().st_mtime_ns else None
        if kept is not None and all(numpy.array_equal(change.read(base), change.old) for change in kept.changes):
            return kept
    return None


def _computed(path: Path, folder: Path, digest: str, before: Kept | None) -> Kept:
    """Compute the blocks of an adapter, given what is in the file now."""
    saved, file = s2ft.read_adapter(folder), GgufFile(path)
    if before is not None:
        before.put_back(file.reader.data)  # in this process alone
    if _new_template(file, saved) is not None:
        logger.warning("the chat template of %s is not the one that the adapter was trained with", path.name)
    arrived = Arrived()
    changes = list(new_blocks(file, saved, merged_paths(file, saved), arrived))
    logger.info("%s", arrived.told(path.name))
    _earlier(path, digest).unlink(missing_ok=True)  # of another base
    return Kept(path, changes, saved.name, digest)


def _digest(folder: Path) -> str:
    """The hash of an adapter's files."""
    found, files = hashlib.sha256(), (path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    for path in sorted(files):
        found.update(path.name.encode() + b"\0" + read_bytes(path, MAX_TENSORS))
    return found.hexdigest()


def undo(file: str | Path) -> str:
    """Put the base's bytes back into a patched file, also after an interrupt.

    Args:
        file: The file.

    Returns:
        A sentence about what has changed.

    Raises:
        FileNotFoundError: The file does not exist.
        PermissionError: The file can't be written.
        ValueError: The file is not patched, it was changed since, or another program uses it. Nothing has changed.
    """
    path = gguf_path(str(file))

    def restore(data: numpy.memmap, flush: Callable[[numpy.memmap], None]) -> str:
        kept = Kept.of(path)
        if kept is None:
            raise ValueError(f"{path} is not patched: there is no {path.name}{PATCHED}")
        whole = kept.is_whole(data)
        beside = kept.path.with_name(kept.path.name + PATCHED)
        is_changed = path.stat().st_mtime_ns != beside.stat().st_mtime_ns  # see _in_file
        _undo(kept, data, flush)
        size = sum(change.old.nbytes for change in kept.changes)
        replaced = f"{'' if whole else 'parts of '}adapter {kept.adapter!r}"
        said = f"{path}: {size:,} bytes are the base's again, in place of {replaced}"
        if is_changed:
            said += "; the file was written to since the last switch, and what has changed elsewhere in it stays"
        return said

    return _in_file(path, restore)


def state(file: str | Path) -> str:
    """Say which adapter is in a file."""
    path = gguf_path(str(file))
    kept = Kept.of(path)
    if kept is None:
        return f"{path} is not patched"
    whole = kept.is_whole(numpy.memmap(path, numpy.uint8, "r"))
    return f"{path} has adapter {kept.adapter!r}" + ("" if whole else ", not all of it: s2ft patch --undo")


def _undo(kept: Kept, data: numpy.memmap, flush: Callable[[numpy.memmap], None]) -> None:
    """Put the old bytes back, after :meth:`Kept.is_whole`."""
    if not os.access(kept.path.parent, os.W_OK):
        raise PermissionError(
            f"{kept.path.parent} is read-only, and the file beside {kept.path.name} gets another name"
        )
    kept.put_back(data)
    flush(data)
    kept.rename(is_in_file=False)


def _in_file(path: Path, act: Callable[[numpy.memmap, Callable[[numpy.memmap], None]], Result]) -> Result:
    """Map a file for writing, if no other program has it open, and return what `act` returns.

    Each flush gives the files beside it the file's time of change. If a later time differs, another program has changed
    the file: then those files keep their time, and the next switch compares the base's hash.

    Args:
        path: The file.
        act: Takes the file's bytes, and a function that writes them to the disk.

    Raises:
        ValueError: Another program has the file open.
    """
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lease in (fcntl.F_WRLCK, fcntl.F_UNLCK) if hasattr(fcntl, "F_SETLEASE") else ():
                fcntl.fcntl(file, fcntl.F_SETLEASE, lease)  # Linux gives it to the only one that has the file open
        except OSError as error:
            if error.errno == errno.EAGAIN:  # another error: the system can't tell, or not this user
                raise ValueError(f"{path} is open in a program, whose model would change: stop it first") from None
        times, beside = [path.stat().st_mtime_ns], f"{escape(path.resolve().name)}.s2ft-*"

        def flush(data: numpy.memmap) -> None:
            data.flush()
            times.append(path.stat().st_mtime_ns)
            for kept in (one for one in path.resolve().parent.glob(beside) if one.stat().st_mtime_ns in times):
                with suppress(OSError):  # of another user: the next switch compares the hash
                    os.utime(kept, ns=2 * (times[-1],))

        try:
            return act(numpy.memmap(file, numpy.uint8, "r+"), flush)
        except BaseException as error:
            clear_frames(error.__traceback__)  # else an interpreter that keeps the error keeps the file open
            raise


def _synchronize(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
