"""An adapter in the blocks of a GGUF file in place, and the file as it was.

A file beside it keeps the old bytes of the blocks. It is complete on the disk before the first block is written, and
goes after the last one is back. So whatever interrupts a change, the old bytes can be put back.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
from safetensors import SafetensorError
from safetensors.numpy import load, save

import s2ft
from s2ft.export.packed import Change, PackedMerge, gguf_path
from s2ft.files.gguf_file import GgufFile
from s2ft.files.reading import MAX_TENSORS, read_bytes
from s2ft.files.replacing import replace_file

SUFFIX = ".s2ft-base"  # of the file with the old bytes


class Kept:
    """The old and the new bytes of a patched file."""

    def __init__(self, path: Path, changes: list[Change], old: list[numpy.ndarray], adapter: str) -> None:
        """Keep the old bytes of changes of a file.

        Args:
            path: The patched file.
            changes: The changes.
            old: The bytes before each of them.
            adapter: Name of the adapter that is in the file.
        """
        self.path, self.changes, self.old, self.adapter = path, changes, old, adapter

    @classmethod
    def of(cls, path: Path) -> "Kept | None":
        """Read what is kept of a file; None if it is not patched.

        Raises:
            ValueError: The file with the old bytes is damaged.
        """
        beside = path.with_name(path.name + SUFFIX)
        if not beside.exists():
            return None
        try:
            found = load(read_bytes(beside, MAX_TENSORS))
            steps, parts = found["steps"].tolist(), ("rows", "blocks", "new", "old")
            each = [[found[f"{number}.{part}"] for part in parts] for number in range(len(steps))]
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{beside} is truncated or damaged: {error}") from None
        changes = [Change(start, (row, size), *new) for (start, row, size), (*new, _) in zip(steps, each)]
        return cls(path, changes, [old for *_, old in each], bytes(found["adapter"]).decode())

    def save(self) -> None:
        """Write the file beside, in one step."""
        steps = [(change.start, *change.steps) for change in self.changes]
        tensors = {"steps": numpy.array(steps), "adapter": numpy.frombuffer(self.adapter.encode(), numpy.uint8)}
        for number, (change, old) in enumerate(zip(self.changes, self.old)):
            found = {"rows": change.rows, "blocks": change.blocks, "new": change.new, "old": old}
            tensors.update({f"{number}.{part}": numpy.ascontiguousarray(value) for part, value in found.items()})
        replace_file(self.path.with_name(self.path.name + SUFFIX), save(tensors))
        _synchronize(self.path.parent)

    def put_back(self, data: numpy.ndarray) -> bool:
        """Write the old bytes into those of the file. Returns whether all of the new ones were there.

        Raises:
            ValueError: The file has bytes that are neither the old nor the new ones. Nothing is written then.
        """
        whole = True
        for change, old in zip(self.changes, self.old):
            try:
                now = change.read(data)
            except (IndexError, ValueError):  # the file is smaller
                now = ~change.new
            is_new = now == change.new
            if not (is_new | (now == old)).all():
                raise ValueError(
                    f"{self.path} is not the file that was patched: it was replaced or changed since. Delete "
                    f"{self.path.name}{SUFFIX} to keep it as it is"
                )
            whole &= bool(is_new.all())
        for change, old in zip(self.changes, self.old):
            change.write(data, old)
        return whole

    def forget(self) -> None:
        """Delete the file beside."""
        self.path.with_name(self.path.name + SUFFIX).unlink()
        _synchronize(self.path.parent)


def patch(file: str | Path, adapter: str | Path) -> str:
    """Write an adapter into a GGUF file in place, in the place of another one if the file has one.

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
    path = gguf_path(str(file))
    saved = s2ft.read_adapter(adapter)
    with _writable(path) as data:
        base, before = GgufFile(path), Kept.of(path)
        if before is not None:
            before.put_back(base.reader.data)  # in this process alone
        changes = list(PackedMerge(base, saved).changes())
        if before is not None:
            _undo(before, data)
        kept = Kept(path, changes, [change.read(data) for change in changes], saved.name)
        kept.save()
        for change in changes:
            change.write(data, change.new)
        data.flush()
    size = sum(change.new.nbytes for change in changes)
    return f"{path}: {size:,} bytes are those of adapter {saved.name!r}; s2ft patch --undo puts the base's back"


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
    with _writable(path) as data:
        kept = Kept.of(path)
        if kept is None:
            raise ValueError(f"{path} is not patched: there is no {path.name}{SUFFIX}")
        whole = _undo(kept, data)
    return f"{path}: the base's bytes are back in place of {'' if whole else 'parts of '}adapter {kept.adapter!r}"


def state(file: str | Path) -> str:
    """Say which adapter is in a file."""
    path = gguf_path(str(file))
    kept = Kept.of(path)
    if kept is None:
        return f"{path} is not patched"
    whole = kept.put_back(numpy.memmap(path, numpy.uint8, "c"))
    return f"{path} has adapter {kept.adapter!r}" + ("" if whole else ", not all of it: s2ft patch --undo")


def _undo(kept: Kept, data: numpy.memmap) -> bool:
    whole = kept.put_back(data)
    data.flush()
    kept.forget()
    return whole


@contextmanager
def _writable(path: Path) -> Iterator[numpy.memmap]:
    """Map a file's bytes for writing, if no other program has it open."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # which Linux gives to the only one that has it open
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ValueError(f"{path} is open in a program, whose model would change: stop it first") from None
        yield numpy.memmap(file, numpy.uint8, "r+")


def _synchronize(folder: Path) -> None:
    """Let the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
