"""Reading files of unknown origin.

Nothing here runs code of a file, and nothing needs more memory than a few times the size of the file.

The two files of an adapter's folder are replaced as one. A writer puts the new config next to the old one as a pending
file, renames the new tensors into place, then renames the pending config over the config. The rename of the tensors is
the moment from which the folder holds the new adapter. A reader takes the config whose ``tensors_sha256`` is that of
the tensors file. A writer that is stopped at any point leaves the old adapter or the new one.
"""

import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from s2ft.files.plain_text import MAX_NAME, sha256_of, shortened

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


# ---- names ---------------------------------------------------------------------------------------------

WORD = r"[\w\-]+"
PROJECTION = re.compile(rf"{WORD}(?:\.{WORD})*(?:\[[0-9]{{1,9}}\])?(?:\.[a-z])?")


def check_projection(name: Any, where: str) -> None:
    """Raise ValueError unless `name` is a projection's name: words separated by dots, then any expert's number."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not PROJECTION.fullmatch(name):
        raise ValueError(f"{where}: {shortened(name)} is not the name of a projection")


def check_parameter(name: Any, where: str) -> None:
    """Raise ValueError unless `name` is a parameter's name: words separated by dots."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not re.fullmatch(rf"{WORD}(?:\.{WORD})*", name):
        raise ValueError(f"{where}: {shortened(name)} is not the name of a parameter")


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError if the values have a NaN or an infinite value. Values on the meta device are not checked."""
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} is not finite: it has NaN or infinite values")


# ---- the folder of an adapter ---------------------------------------------------------------------------------------


ADAPTER = "adapter"  # the folder of the adapter in the output folder of a run
TENSORS = "s2ft_adapter.safetensors"
PATCHED = ".s2ft-base"  # behind the name of a file that `s2ft patch` has changed: the file with the old bytes
CONFIG = "s2ft_config.json"  # PEFT and AutoModel would load an adapter_config.json as their own
PENDING = f"{CONFIG}.next"  # exists while the tensors are replaced, and after a writer was stopped
KIND = "an S²FT adapter"
ATTEMPTS = 20  # at reading a folder that other processes keep replacing

Read = TypeVar("Read")


def is_patched(file: str) -> bool:
    """Whether `s2ft patch` has put an adapter into a file, which may be named by a link."""
    return os.path.exists(os.path.realpath(file) + PATCHED)


def gguf_files(path: Path) -> list[Path]:
    """The GGUF files that a path means as a model: itself, or those of a folder that has no other checkpoint."""
    has_others = (path / "config.json").is_file() and any([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return [path] if path.suffix == ".gguf" else [] if has_others else sorted(path.glob("*.gguf"))


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


def read_folder(directory: Path, read: Callable[[Path], Read]) -> Read:  # type: ignore[return]  # the last attempt ends
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
            return read(open_file(directory, _config_name(directory), KIND))
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
    return PENDING if sha256_of(open_file(directory, TENSORS, KIND)) == expected else CONFIG
