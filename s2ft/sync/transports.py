"""How the numbers of an update reach an engine: in the request, by a file, or as a tensor."""

import base64
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2ft.sync.engines import Engine

KINDS = ("direct", "file", "http")
MEMORY = Path("/dev/shm")  # a disk in the memory of this machine
Post = Callable[[dict[str, Any]], None]


class Transport:
    """A way for the numbers: as they are, for an engine in this process.

    Attributes:
        kind: Its name in messages.
    """

    kind = "direct"

    def open(self, init: Post) -> None:
        """Call `init` with the description of this transport."""
        init({"kind": self.kind})

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        """Call `update` with the message and the numbers."""
        update({**message, "tensor": flat})

    def close(self) -> None:
        """Give up what the transport holds."""


class Http(Transport):
    """The numbers in the request, as base64: a third more bytes."""

    kind = "http"

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        update({**message, "values": base64.b64encode(_bytes(flat)).decode()})


class File(Transport):
    """A file in a folder that the engine can read, such as a disk in memory. It is removed after each update.

    Attributes:
        folder: The folder.
    """

    kind = "file"

    def __init__(self, folder: Path, sender: str) -> None:
        if not folder.is_dir():
            raise ValueError(f"folder {folder} does not exist")
        self.folder, self._sender = folder, sender

    def open(self, init: Post) -> None:
        init({"kind": self.kind, "folder": str(self.folder)})

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        handle, name = tempfile.mkstemp(prefix=".s2ft-", dir=self.folder)
        path = self.folder / f"s2ft-{self._sender}-{message['step']}"
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_bytes(flat))
            os.replace(name, path)  # the engine never sees half a file
            update({**message, "file": str(path)})
        finally:
            Path(name).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def close(self) -> None:
        for left in self.folder.glob(f"s2ft-{self._sender}-*"):
            left.unlink(missing_ok=True)


def transport_of(kind: str, engine: Engine, sender: str, folder: str | os.PathLike | None) -> Transport:
    """Make a transport.

    Args:
        kind: One of KINDS.
        engine: The engine.
        sender: Name of the sender, which the file gets.
        folder: Folder for the file, which the engine can read. Default: memory of this machine.

    Raises:
        ValueError: There is no such transport, or the engine can't use it.
    """
    if kind not in KINDS:
        raise ValueError(f"transport must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "direct" and not engine.is_local:
        raise ValueError("transport direct needs an LLM in this process; a server can have file or http")
    if kind == "file":
        return File(Path(folder) if folder else MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()), sender)
    return Http() if kind == "http" else Transport()


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(np.ascontiguousarray(flat.detach().cpu().view(torch.uint8).numpy()))
