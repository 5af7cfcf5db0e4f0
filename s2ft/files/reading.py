"""Files of unknown origin: reading them, safetensors files a tensor at a time, and the folder of an adapter.

Nothing here runs code of a file, and nothing needs more memory than a few times the size of the file.

The two files of an adapter's folder are replaced as one, see :func:`s2ft.adapter.native.write`. A writer puts the new
config next to the old one as a pending file, renames the new tensors into place, then renames the pending config over
the config. The rename of the tensors is the moment from which the folder holds the new adapter. A reader takes the
config whose ``tensors_sha256`` is that of the tensors file. A writer that is stopped at any point leaves the old
adapter or the new one.
"""

import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from s2ft.files.plain_text import first_line, sha256_of, shortened

MAX_CONFIG = 2**28  # bytes, for 40 million units; mixtures of 256 experts in 60 layers have about 8
MAX_TENSORS = 64 * 2**30  # bytes of a safetensors file
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz")  # reading such files can run code


def open_file(directory: Path, name: str, kind: str) -> Path:
    """Return the path of a file in a folder.

    Args:
        directory: The folder.
        name: The file's name.
        kind: What the folder should be, with an article, for the message.

    Raises:
        FileNotFoundError: The file does not exist. The message names pickles that are there instead.
        ValueError: The file is a link that leads out of the folder.
    """
    path = directory / name
    if not directory.exists():
        raise FileNotFoundError(f"there is no folder {directory}")
    if not path.is_file():
        pickles = (
            sorted(entry.name for entry in directory.iterdir() if entry.suffix in PICKLES) if directory.is_dir() else []
        )
        raise FileNotFoundError(
            f"{directory} is not {kind}: it has no {name}"
            + (
                f" ({', '.join(pickles[:3])}: such files run code and are not read; save as safetensors)"
                if pickles
                else ""
            )
        )
    target, own = path.resolve(), directory.resolve()
    snapshots = [folder for folder in (own, *own.parents) if folder.parent.name == "snapshots"]
    # Snapshots of huggingface_hub link to its blobs.
    if not any(target.is_relative_to(root) for root in (own, *(one.parent.parent / "blobs" for one in snapshots))):
        raise ValueError(f"{path} is a link that leads out of its folder: put the file itself there")
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file. Raises ValueError, before reading, if it has more than `limit` bytes."""
    with open_regular(path) as file:
        return read_all(file, path, limit)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading bytes. Pipes and devices are refused, because reading them may never end.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The path is a folder, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file: give a file that is stored on a disk")
    return os.fdopen(descriptor, "rb")


def read_all(file: BinaryIO, path: Path, limit: int) -> bytes:
    """Return the content of an open file from its position on, see :func:`read_bytes`."""
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {limit:,}")
    return file.read(size)  # a file that is growing is read up to this size


def gguf_files(path: Path) -> list[Path]:
    """The GGUF files that a path means as a model: itself, or those of a folder that has no other checkpoint."""
    has_others = (path / "config.json").is_file() and any([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return [path] if path.suffix == ".gguf" else [] if has_others else sorted(path.glob("*.gguf"))


# ---- JSON ----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises ValueError for a file that is too big, or as :func:`parse_json`."""
    return parse_json(read_bytes(path, MAX_CONFIG), str(path))


def json_entry(path: Path, *keys: str) -> Any:
    """Return what a JSON file has under these keys, one inside the other. None where it can't be read, or lacks one."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def parse_json(content: bytes, what: str) -> Any:
    """Parse JSON in UTF-8 without duplicate keys, NaN or Infinity. Raises ValueError, beginning with `what`."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8: {error}") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def no_constant(word: str) -> float:
    """Refuse NaN and Infinity, which Python reads but JSON does not have. For `parse_constant` of json.loads."""
    raise ValueError(f"{word} is not a number in JSON")


# ---- safetensors files, a tensor at a time --------------------------------------------------------------------------
#
# For whole models. The safetensors library maps files into memory, whose pages count as memory of the process while
# they are read, and it writes a file from tensors that are all in memory. Here a tensor is read into a buffer of its
# own, and a file is laid out first and filled in any order. The format is eight bytes with the length of a JSON header,
# the header, and the tensors' bytes one after the other.

PIECE = 8 * 2**20  # bytes that are copied at a time
MAX_HEADER = 512 * 2**20  # bytes; a file with a million tensors needs about 150 MiB
MAX_CHECKED_HEADER = 32 * 2**20  # of an adapter; mixtures of 256 experts in 60 layers need about 13 MiB
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Entries = dict[str, tuple[str, tuple[int, ...]]]  # the dtype's name and the shape of each tensor
Check = Callable[[Entries], None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: The file.
        start: Position of its first byte in the file.
        dtype: Its dtype.
        shape: Its shape.
    """

    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return self.dtype.itemsize * prod(self.shape)

    def empty(self) -> Tensor:
        """A tensor of this shape and dtype on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """Read the tensor into memory of its own.

        Raises:
            ValueError: The file is truncated.
        """
        with open_regular(self.file) as file:
            return self.read_from(file)

    def read_from(self, file: BinaryIO) -> Tensor:
        """Read the tensor from its file, which is open, see :meth:`read`."""
        return _read_at(file, self.start, self.bytes, self.file).view(self.dtype).view(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        """Read the elements in order, a flat piece at a time.

        Raises:
            ValueError: The file is truncated.
        """
        with open_regular(self.file) as file:
            for start in range(0, self.bytes, PIECE):
                yield _read_at(file, self.start + start, min(PIECE, self.bytes - start), self.file).view(self.dtype)

    def write(self, pieces: Iterable[Tensor]) -> int:
        """Write the tensor into its place in a file that :func:`lay_out` has made. Returns the sum of its bytes.

        Args:
            pieces: Consecutive pieces of its elements, or one with all of them. They are cast to its dtype.

        Raises:
            ValueError: The pieces have another number of elements.
        """
        total, written = 0, 0
        with open(self.file, "r+b", buffering=0) as file:
            file.seek(self.start)
            for piece in pieces:
                content = as_bytes(piece.to(self.dtype)).numpy().data
                total, written = zlib.crc32(content, total), written + len(content)
                while content:
                    content = content[file.write(content) :]
        if written != self.bytes:
            raise ValueError(f"{self.file}: a tensor of {self.bytes:,} bytes was to be written, got {written:,}")
        return total

    def checksum(self) -> int:
        """The sum of its bytes in the file, as :meth:`write` returns it."""
        total = 0
        for piece in self.pieces():
            total = zlib.crc32(as_bytes(piece).numpy().data, total)
        return total


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor in order as bytes [n] uint8: a view if the tensor is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def checksum(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, as :meth:`StoredTensor.checksum` has it."""
    return zlib.crc32(as_bytes(tensor).numpy().data)


def _read_at(file: BinaryIO, start: int, size: int, path: Path) -> Tensor:
    """Read bytes [size] uint8 of a file into memory of their own."""
    file.seek(start)
    content = numpy.fromfile(file, numpy.uint8, size)
    if content.size < size:
        raise ValueError(f"{path} is truncated: it ends at byte {start + content.size:,}, inside a tensor")
    return torch.from_numpy(content)


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError if the values have a NaN or an infinite value. Values on the meta device are not checked."""
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} is not finite: it has NaN or infinite values")


# ---- safetensors: reading a file ------------------------------------------------------------------------


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name. Their values are not read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, or its header is damaged or has an unknown dtype.
    """
    with open_regular(path) as file:
        return _header(file, path, MAX_HEADER)


def read_tensors(path: Path, check: Check) -> tuple[dict[str, Tensor], bytes]:
    """Return all tensors of a safetensors file by name, and the file's bytes.

    Args:
        path: The file.
        check: A function that takes the header's entries, {name: (dtype's name, shape)}, and raises ValueError to
            refuse the file. It is called before the tensors are read.

    Raises:
        ValueError: The file is truncated, damaged or too big, or `check` refuses it.
    """
    with open_regular(path) as file:  # opened once, because another process may replace the file
        check(_entries(_header(file, path, MAX_CHECKED_HEADER)))
        file.seek(0)
        blob = read_all(file, path, MAX_TENSORS)
    try:
        return load(blob), blob
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None


def read_some_tensors(path: Path, check: Check, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return some tensors of a safetensors file by name. The others are on the meta device and are not read.

    Args:
        path: The file.
        check: As for :func:`read_tensors`.
        wanted: Takes a tensor's name, and returns whether it is read.

    Raises:
        ValueError: As for :func:`read_tensors`, but damage inside the tensors is not found.
    """
    with open_regular(path) as file:
        stored = _header(file, path, MAX_CHECKED_HEADER)
        check(_entries(stored))
        return {name: one.read_from(file) if wanted(name) else one.empty() for name, one in stored.items()}


def _entries(stored: dict[str, StoredTensor]) -> Entries:
    return {name: (DTYPE_NAMES[one.dtype], one.shape) for name, one in stored.items()}


def _header(file: BinaryIO, path: Path, limit: int) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, and check that each byte behind it is one of exactly one tensor.

    Args:
        file: The file, opened.
        path: Its path.
        limit: Bytes that a header may have.

    Raises:
        ValueError: The file is truncated or damaged, has an unknown dtype, or the header is too big.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path} is truncated or damaged: its header ends outside the file")
    if length > limit:
        raise ValueError(f"{path} has a header of {length:,} bytes; at most {limit:,} are read")
    header = parse_json(file.read(length), f"{path} is truncated or damaged: its header")
    if not isinstance(header, dict):
        raise ValueError(f"{path} is truncated or damaged: its header is no object")
    header.pop("__metadata__", None)
    stored = {name: _stored(name, entry, path, 8 + length) for name, entry in header.items()}
    places = sorted((one.start, one.start + one.bytes) for one in stored.values())
    if [8 + length, *(end for _, end in places)] != [*(start for start, _ in places), size]:
        raise ValueError(f"{path} is truncated or damaged: its header describes other bytes than the file has")
    return stored


def _stored(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    found: Any = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = map(found.get, ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: {shortened(name)} has dtype {shortened(dtype)}, which s2ft does not read")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise ValueError(f"{path}: {shortened(name)} has no valid shape, got {shortened(shape)}")
    first = offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1
    if first < 0 or offsets != [first, first + DTYPES[dtype].itemsize * prod(shape)]:
        raise ValueError(f"{path} is truncated or damaged: {shortened(name)} has no valid place in it")
    return StoredTensor(path, start + first, DTYPES[dtype], tuple(shape))


# ---- safetensors: writing a file ------------------------------------------------------------------------


def lay_out(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Create a safetensors file with a place for every tensor. The places hold zeros until they are written.

    Args:
        path: The file to create.
        tensors: Tensors by name. Only their shapes and dtypes are used: they may be on the meta device.

    Returns:
        The place of each tensor.

    Raises:
        FileExistsError: The file exists.
        KeyError: A tensor has a dtype that the format lacks.
    """
    # Large elements first, so that every tensor is aligned to its elements' size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    places, end = {}, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        first, end = end, end + tensors[name].numel() * tensors[name].element_size()
        places[name] = first
        header[name] = {
            "dtype": DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {
        name: StoredTensor(path, 8 + len(text) + first, tensors[name].dtype, tuple(tensors[name].shape))
        for name, first in places.items()
    }


# ---- the folder of an adapter ---------------------------------------------------------------------------------------


ADAPTER = "adapter"  # the folder of the adapter in the output folder of a run
TENSORS = "s2ft_adapter.safetensors"
PATCHED = ".s2ft-base"  # behind the name of a file that `s2ft patch` has changed: the file with the old bytes
CONFIG = "s2ft_config.json"  # PEFT and AutoModel would load an adapter_config.json as their own
PENDING = f"{CONFIG}.next"  # exists while the tensors are replaced, and after a writer was stopped
OPTIONS, RUN = "config.yaml", "run.json"  # of a run: the options that the user gave, and all that determine the result
AN_ADAPTER = "an S²FT adapter"
WORD = r"[A-Za-z0-9][\w.\-]*"
REPOSITORY = re.compile(rf"{WORD}/{WORD}(?:@[\w./\-]+)?", re.ASCII)  # org/name, org/name@revision on the hub
ATTEMPTS = 20  # at reading a folder that other processes keep replacing

Read = TypeVar("Read")


def is_patched(file: str) -> bool:
    """Whether `s2ft patch` has put an adapter into a file, which may be named by a link."""
    return os.path.exists(os.path.realpath(file) + PATCHED)


def has_adapter(directory: Path) -> bool:
    """Whether the folder has the files of an adapter; they are not read."""
    return stamp_of(directory) is not None


def own_folder(directory: Path) -> Path:
    """The folder of an adapter's files: the directory, or the folder in it if it is the output of a run."""
    inside = directory / ADAPTER
    return inside if not has_adapter(directory) and has_adapter(inside) else directory


def stamp_of(directory: Path) -> tuple | None:
    """A value that changes with every save to the folder; None if the folder has no adapter."""
    config, pending, tensors = (_stamp(directory / name) for name in (CONFIG, PENDING, TENSORS))
    return None if tensors is None or (config is None and pending is None) else (config, pending, tensors)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # the file does not exist, or no file can have this name
        return None
    return (found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def read_consistent(directory: Path, read: Callable[[Path], Read]) -> Read:  # type: ignore[return]  # the last attempt ends
    """Call `read` with the config file that belongs to the folder's tensors, and return its result.

    Args:
        directory: The adapter's folder.
        read: Takes the path of the config file. It is called again where it fails and another process has replaced
            the adapter meanwhile.

    Raises:
        FileNotFoundError: The folder has no config file.
        Exception: Whatever `read` raises for files that do not change.
    """
    for attempt in range(ATTEMPTS):
        before = stamp_of(directory)
        try:
            return read(open_file(directory, _config_name(directory), AN_ADAPTER))
        except (OSError, ValueError):
            if attempt == ATTEMPTS - 1 or stamp_of(directory) == before:
                raise


def _config_name(directory: Path) -> str:
    """The name of the config file that belongs to the tensors file. Only a folder with a pending config has two."""
    if not (directory / PENDING).is_file() or not (directory / TENSORS).is_file():
        return CONFIG
    if not (directory / CONFIG).exists():
        return PENDING
    expected = json_entry(directory / PENDING, "tensors_sha256")
    return PENDING if sha256_of(open_file(directory, TENSORS, AN_ADAPTER)) == expected else CONFIG


def is_run(folder: Path) -> bool:
    """Whether the folder is the output of a run, which may have saved no adapter yet."""
    return any((folder / name).is_file() for name in (OPTIONS, RUN))


def adapter_folder(folder: Path) -> Path:
    """Return the folder of an adapter's files: `folder`, or `folder/adapter` for the output folder of a run.

    Args:
        folder: An adapter's folder, a checkpoint, or the output folder of a run.

    Raises:
        FileNotFoundError: The folder does not exist, or the run has not saved its adapter yet. The message says what
            to give instead.
    """
    if has_adapter(own_folder(folder)):
        return own_folder(folder)
    if not folder.exists():
        raise FileNotFoundError(f"adapter {folder} doesn't exist")
    if is_run(folder):
        raise FileNotFoundError(
            f"{folder} is the output of a run that has saved no adapter yet: finish the run with --resume, or name one "
            "of its checkpoints"
        )
    return folder  # the reader raises the error that names the missing file


def local_folder(directory_or_repo, **options) -> Path:
    """Return the folder of an adapter. The files of a repository are downloaded, unless they are in the cache.

    Args:
        directory_or_repo: A folder of an adapter, the output folder of a run, or a repository on the hub, as
            "org/name" or "org/name@revision". A folder that exists takes precedence over a repository.
        options: Arguments of huggingface_hub's snapshot_download, for example token, cache_dir or local_files_only.

    Returns:
        The folder. If it does not exist, the reader of the folder raises the error.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository, or the run has not saved an adapter.
    """
    path = Path(directory_or_repo).expanduser()
    if path.exists() or not isinstance(directory_or_repo, str) or not REPOSITORY.fullmatch(directory_or_repo):
        return adapter_folder(path)
    from huggingface_hub import snapshot_download  # only where it is needed

    repo_id, _, revision = directory_or_repo.partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=[CONFIG, TENSORS], **options))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors: no such repository, no network
        raise FileNotFoundError(
            f"adapter {directory_or_repo} doesn't exist as a folder, and the hub gives no adapter of this name: "
            f"{first_line(error)}"
        ) from error
