"""Safetensors files, read and written one tensor at a time, so that memory stays below the size of a few tensors.

The safetensors library maps files into memory, whose pages count as memory of the process while they are read, and it
writes a file from tensors that are all in memory. Here a tensor is read into a buffer of its own, and a file is laid
out first and filled in any order. The format is eight bytes with the length of a JSON header, the header, and the
tensors' bytes one after the other.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from s2ft.files.reading import MAX_TENSORS, open_regular, parse_json, read_all, shortened

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
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


# ---- reading a file -------------------------------------------------------------------------------------


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
    return {name: (NAMES[one.dtype], one.shape) for name, one in stored.items()}


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


# ---- writing a file -------------------------------------------------------------------------------------


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
            "dtype": NAMES[tensors[name].dtype],
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
