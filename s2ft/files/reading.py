"""Reading files that someone else made: bounded, inside their folder, and checked before anything is built of them.

What a folder holds may come from anywhere. Nothing here runs code of a file, and nothing takes more memory than a
few times a file's own size.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

MAX_CONFIG = 64 * 2**20  # bytes; mixtures of 256 experts in 60 layers need about 10 MiB
MAX_HEADER = 32 * 2**20  # of a safetensors file, as the same mixtures need about 13 MiB
MAX_TENSORS = 64 * 2**30  # of all tensors
MAX_NAME = 500  # characters
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz")  # kinds of files that run code when they are read
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")


def open_file(directory: Path, name: str, kind: str) -> Path:
    """The file `name` of a folder. kind: what the folder should be, for the message.

    Raises: FileNotFoundError where there is none, naming a pickle that lies there in its stead; ValueError for a
    link that leads out of the folder.
    """
    path = directory / name
    if not directory.exists():
        raise FileNotFoundError(f"there is no folder {directory}")
    if not path.is_file():
        pickles = (
            sorted(entry.name for entry in directory.iterdir() if entry.suffix in PICKLES) if directory.is_dir() else []
        )
        raise FileNotFoundError(
            f"{directory} is no {kind}: it has no {name}"
            + (
                f" ({', '.join(pickles[:3])}: such files run code when they are read and are not; save as safetensors)"
                if pickles
                else ""
            )
        )
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in _roots(directory.resolve())):
        raise ValueError(f"{path} is a link that leads out of its folder: put the file itself there")
    return path


def _roots(directory: Path) -> list[Path]:
    """Where a folder's files may lie: in it, and for a folder in the cache of huggingface_hub in that repository's
    blobs, which snapshots link to."""
    snapshots = [folder for folder in (directory, *directory.parents) if folder.parent.name == "snapshots"]
    return [directory] + [folder.parent.parent / "blobs" for folder in snapshots]


def read_bytes(path: Path, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises: ValueError for a bigger one, before it is read."""
    with open_regular(path) as file:
        return _read_all(file, path, limit)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes. A pipe or a device would never end.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file: give a file that is stored on a disk")
    return os.fdopen(descriptor, "rb")


def _read_all(file: BinaryIO, path: Path, limit: int) -> bytes:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {limit:,}")
    return file.read(size)  # no more, should it be growing


# ---- JSON ----------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Raises: ValueError for what is not JSON in UTF-8 with every key once and finite numbers, or too big."""
    return parse_json(read_bytes(path, MAX_CONFIG), str(path))


def parse_json(content: bytes, what: str) -> Any:
    """Raises: ValueError, beginning with `what`."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
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


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


# ---- names ---------------------------------------------------------------------------------------------

WORD = r"[\w\-]+"
PROJECTION = re.compile(rf"{WORD}(?:\.{WORD})*(?:\[[0-9]{{1,9}}\])?(?:\.[a-z])?")


def check_projection(name: Any, where: str) -> None:
    """Raises: ValueError for what is no name of a projection: words with dots between, then the expert's number."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not PROJECTION.fullmatch(name):
        raise ValueError(f"{where}: {shortened(name)} is no name of a projection")


def check_parameter(name: Any, where: str) -> None:
    """Raises: ValueError for what is no name of a parameter: words with dots between."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not re.fullmatch(rf"{WORD}(?:\.{WORD})*", name):
        raise ValueError(f"{where}: {shortened(name)} is no name of a parameter")


def check_adapter_name(name: Any, where: str = "name") -> None:
    """The one check of adapters' names, before training as well as in files.

    Args:
        name: The name to check.
        where: What the message begins with: the argument, or the file that has the name.

    Raises:
        ValueError: It is not a printable word of at most MAX_NAME characters, has a slash, or begins with a dot.
    """
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= MAX_NAME
        or not name.isprintable()
        or name.startswith(".")
        or "/" in name
        or "\\" in name
    ):
        raise ValueError(
            f"{where}: an adapter's name must be a word without slashes, got {shortened(name)}: give "
            f"at most {MAX_NAME} printable characters, and no dot in front"
        )


def shortened(value: Any) -> str:
    """In quotes, without anything that a terminal takes for a command, and short."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


# ---- safetensors ---------------------------------------------------------------------------------------


def read_tensors(path: Path, check) -> tuple[dict[str, Tensor], bytes]:
    """All tensors of a file, and its bytes.

    Args:
        check: takes the header's entries, {name: (dtype's name, shape)}, and raises ValueError for what is not
            wanted; nothing but the header has been read then.
    Raises: ValueError for a file that is truncated, damaged, too big, or of other dtypes than floats and integers.
    """
    with open_regular(path) as file:  # once: another process may replace it
        check(_entries(file, path))
        file.seek(0)
        blob = _read_all(file, path, MAX_TENSORS)
    try:
        return load(blob), blob
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None


def _entries(file: BinaryIO, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape by name, once the header agrees with the file's size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size > MAX_TENSORS:
        raise ValueError(f"{path} has {size:,} bytes; such a file has at most {MAX_TENSORS:,}")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path} is truncated or damaged: its header ends outside the file")
    if length > MAX_HEADER:
        raise ValueError(f"{path} has a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    header = parse_json(file.read(length), f"{path} is truncated or damaged: its header")
    if not isinstance(header, dict):
        raise ValueError(f"{path} is truncated or damaged: its header is no object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, entry, path) for name, entry in header.items()}
    needed = 8 + length + sum(BYTES[dtype] * _product(shape) for dtype, shape in entries.values())
    if needed != size:
        raise ValueError(f"{path} is truncated or damaged: its header speaks of {needed:,} bytes, it has {size:,}")
    return entries


def _entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...]]:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"{path}: {shortened(name)} has dtype {shortened(dtype)}; {', '.join(BYTES)} are read")
    if not isinstance(shape, list) or len(shape) > 8 or any(type(n) is not int or not 0 <= n < 2**40 for n in shape):
        raise ValueError(f"{path}: {shortened(name)} has no shape but {shortened(shape)}")
    return dtype, tuple(shape)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


def check_finite(name: str, values: Tensor) -> None:
    """Raises: ValueError for a NaN or an infinite value."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} is not finite: it has NaN or infinite values")
