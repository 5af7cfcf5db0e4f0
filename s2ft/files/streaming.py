"""Safetensors files read and written one tensor at a time, so that memory stays below the size of a few tensors.

The safetensors library maps files into memory, whose pages count as memory of the process while they are read, and it
writes a file from tensors that are all in memory. Here a tensor is read into a buffer of its own, and a file is laid
out first and filled in any order. The format is eight bytes with the length of a JSON header, the header, and the
tensors' bytes one after the other.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from s2ft.files.reading import TYPES, open_regular, read_header, shortened

PIECE = 8 * 2**20  # bytes that are copied at a time
MAX_HEADER = 512 * 2**20  # bytes; a file with a million tensors needs about 150 MiB
DTYPES = {
    **TYPES,
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
            return _read_at(file, self.start, self.bytes, self.file).view(self.dtype).view(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        """Read the elements in order, a flat piece at a time.

        Raises:
            ValueError: The file is truncated.
        """
        with open_regular(self.file) as file:
            for start in range(0, self.bytes, PIECE):
                size = min(PIECE, self.bytes - start)
                yield _read_at(file, self.start + start, size, self.file).view(self.dtype)

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


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name. Their values are not read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, or its header is damaged or has an unknown dtype.
    """
    with open_regular(path) as file:
        header, start, size = read_header(file, path, MAX_HEADER)
    return {name: _stored(name, entry, path, start, size) for name, entry in header.items()}


def _stored(name: str, entry: Any, path: Path, start: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = DTYPES.get(dtype)
        if known is None:
            raise ValueError(f"{path}: {shortened(name)} has dtype {shortened(dtype)}, which s2ft does not read")
        stored = StoredTensor(path, start + first, known, shape)
        if first < 0 or last - first != stored.bytes or start + last > size or any(n < 0 for n in shape):
            raise ValueError(f"{path} is truncated or damaged: {shortened(name)} lies outside the file")
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or damaged: {shortened(name)} has no valid entry") from error
    return stored


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
