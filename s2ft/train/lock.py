"""A lock that keeps two runs out of one output folder."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)
LOCK = ".lock"  # in the folder; its text names the process that has the lock
NO_LOCKS = "files in %s can't be locked here: start no second run into it before this one ends"


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The folder is made if need be, and removed if it is still empty at the end.

    The operating system releases the lock when the process ends, however it ends. Where files can't be locked
    (Windows, some network file systems) a warning says so, and nothing is locked.

    Raises:
        FileExistsError: Another process holds the lock; the message names it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder / LOCK):
            yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if fcntl is None:
        logger.warning(NO_LOCKS, path.parent)
        yield
        return
    with _open_and_lock(path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock is released: see _open_and_lock


def _open_and_lock(path: Path):
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FileExistsError(
                f"output folder {path.parent} is in use: {_holder(path)} writes its run there; wait "
                "until that ends, or choose another folder"
            ) from None
        except OSError:  # the file system has no locks
            logger.warning(NO_LOCKS, path.parent)
            return file
        if _is_at(file, path):
            return file
        file.close()  # the process that had the lock removed the file after this one opened it


def _holder(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"


def _is_at(file, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
