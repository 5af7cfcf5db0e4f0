"""A lock that prevents two runs from writing to one output folder."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout  # PyTorch and huggingface_hub need it too

logger = logging.getLogger(__name__)
LOCK = ".lock"  # a file in the folder; its text names the process that holds the lock
NO_LOCKS = "files in %s can't be locked here: start no second run in this folder before this one ends"


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the context.

    The folder is made if it does not exist, and removed if it is still empty at the end. The operating system releases
    the lock when the process ends for any reason. If files cannot be locked (on some network file systems), a warning
    is logged and nothing is locked.

    Args:
        folder: The output folder of a run.

    Raises:
        FileExistsError: Another process holds the lock. The message names the process.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.train.lock import only_run_in
        >>> with only_run_in(Path("run")):
        ...     Path("run/report.json").write_text("{}")
        2
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # the folder is not empty
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path, timeout=0.2)  # not 0: it tries again where a holder has removed the file
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"output folder {path.parent} is in use: {_holder(path)} writes a run to it; wait until that run ends, or "
            "choose another folder"
        ) from None
    except (OSError, NotImplementedError):  # the file system does not support locks
        logger.warning(NO_LOCKS, path.parent)
    try:
        with contextlib.suppress(OSError):  # Windows
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # before the lock is released: who waits for it then opens a new file
        lock.release()


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"
