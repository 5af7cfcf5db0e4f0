"""How the numbers of an update reach an engine: in the request, by a file, by a broadcast, or as a tensor."""

import base64
import os
import socket
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from s2ft.sync.engines import Engine, EngineError
from s2ft.sync.group import Group, join

KINDS = ("direct", "file", "http", "nccl")
MEMORY = Path("/dev/shm")  # a disk in the memory of this machine
Post = Callable[[dict[str, Any]], None]


class Transport(Protocol):
    """A way for the numbers.

    Attributes:
        kind: Its name in messages.
    """

    kind: str

    def open(self, init: Post) -> None:
        """Call `init` with the description of this transport, and connect."""

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        """Call `update` with the message and send the numbers."""

    def close(self) -> None:
        """Give up what the transport holds."""


def transport_of(kind: str, engine: Engine, sender: str, folder: str | os.PathLike | None, timeout: float) -> Transport:
    """Make a transport.

    Args:
        kind: One of KINDS.
        engine: The engine.
        sender: Name of the sender, which the file gets.
        folder: Folder for the file, which the engine can read. Default: memory of this machine.
        timeout: Seconds to wait for the engine's workers.

    Raises:
        ValueError: There is no such transport, or the engine can't use it.
    """
    if kind not in KINDS:
        raise ValueError(f"transport must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "direct" and not engine.is_local:
        raise ValueError("transport direct needs an LLM in this process; a server can have file, http or nccl")
    if kind == "file":
        return File(Path(folder) if folder else MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir()), sender)
    return {"direct": Direct, "http": Http}[kind]() if kind != "nccl" else Broadcast(engine, timeout)


class Direct:
    """The buffer itself, for an engine in this process."""

    kind = "direct"

    def open(self, init: Post) -> None:
        init({"kind": self.kind})

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        update({**message, "tensor": flat})

    def close(self) -> None:
        pass


class Http:
    """The numbers in the request, as base64: a third more bytes."""

    kind = "http"

    def open(self, init: Post) -> None:
        init({"kind": self.kind})

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        update({**message, "values": base64.b64encode(_bytes(flat)).decode()})

    def close(self) -> None:
        pass


class File:
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


class Broadcast:
    """One broadcast to all workers of an engine: NCCL from a GPU, gloo from the CPU."""

    kind = "nccl"

    def __init__(self, engine: Engine, timeout: float) -> None:
        self._workers, self._timeout = engine.world_size(), timeout
        self._group: Group | None = None

    def open(self, init: Post) -> None:
        address, port = _own_address(), _free_port()
        transport = {"kind": self.kind, "master_address": address, "master_port": port}
        transport |= {"rank_offset": 1, "world_size": self._workers + 1}
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        # The engine answers when its workers have joined, and they join while the trainer does.
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(init, transport)
            try:
                self._group = join(transport, 0, device, self._timeout)
            except Exception as error:
                if answer.done():
                    answer.result()  # the engine's own words
                raise EngineError(f"the workers did not join the trainer's group: {error}") from error
            answer.result()

    def send(self, flat: Tensor, message: dict[str, Any], update: Post) -> None:
        assert self._group is not None, "open comes before send"
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(update, message)
            work = self._group.begin_broadcast(flat.contiguous())
            self._wait(work, answer)
            answer.result()

    def _wait(self, work: Any, answer: Future) -> None:
        """Wait for the broadcast, or for the engine's refusal, after which nobody takes part in it."""
        began = time.monotonic()
        while not work.is_completed():
            refused = answer.done() and answer.exception() is not None
            if refused or time.monotonic() - began > self._timeout:
                self.close()
                if not refused:
                    raise EngineError(f"the engine's workers took no part in a broadcast within {self._timeout:g} s")
                return
            time.sleep(0.0005)
        work.wait()

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group = None


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(np.ascontiguousarray(flat.detach().cpu().view(torch.uint8).numpy()))


def _own_address() -> str:
    """The address of this machine by which others reach it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # no packet is sent: the system chooses the address
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
