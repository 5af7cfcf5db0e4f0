"""The two files of an adapter folder, and how they are replaced in one step.

A writer puts the new config next to the old one as a pending file, renames the new tensors into place, then renames the
pending config over the config. The rename of the tensors is the moment from which the folder holds the new adapter. A
reader takes the config whose ``tensors_sha256`` is that of the tensors file. A writer that is stopped at any point
leaves the old adapter or the new one.
"""

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from s2ft.files.reading import json_entry, open_file, open_regular

ADAPTER = "adapter"  # the folder of the adapter in the output folder of a run
TENSORS = "s2ft_adapter.safetensors"
CONFIG = "s2ft_config.json"  # PEFT and AutoModel would load an adapter_config.json as their own
PENDING = f"{CONFIG}.next"  # exists while the tensors are replaced, and after a writer was stopped
KIND = "an S²FT adapter"
ATTEMPTS = 20  # at reading a folder that other processes keep replacing

Read = TypeVar("Read")


def is_folder(directory: Path) -> bool:
    """Whether the folder has the files of an adapter; they are not read."""
    return stamp_of(directory) is not None


def own_folder(directory: Path) -> Path:
    """The folder of an adapter's files: the directory, or the folder in it if it is the output of a run."""
    inside = directory / ADAPTER
    return inside if not is_folder(directory) and is_folder(inside) else directory


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


def read_folder(directory: Path, read: Callable[[Path], Read]) -> Read:
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
    return PENDING if _sha256(open_file(directory, TENSORS, KIND)) == expected else CONFIG


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
