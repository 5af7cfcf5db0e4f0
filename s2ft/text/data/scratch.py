"""Temporary files of Arrow tables. They are removed when the process ends, and never stand in the cache of datasets.

A process that is killed leaves its folder behind. The next process that makes such files removes it.
"""

import atexit
import itertools
import os
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks, so folders of killed processes stay there
    fcntl = None  # type: ignore[assignment]

PREFIX, LOCK = "s2ft-data-", "in-use"
_NUMBERS = itertools.count()
_folders: dict[int, Path] = {}  # by process, since a forked process must not remove the folder of its parent
_locks: dict[int, int] = {}  # open files, which are locked as long as the process lives


def scratch_file(name: str) -> str:
    """Return a new path in the temporary folder of this process. TMPDIR moves the folder.

    Args:
        name: Name of the file. A number is put before it.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.text.data.scratch import scratch_file
        >>> Path(scratch_file("rows.arrow")).exists()
        False
    """
    process = os.getpid()
    if process not in _folders:
        _remove_abandoned()
        folder = _folders[process] = Path(tempfile.mkdtemp(prefix=PREFIX))
        atexit.register(_remove, process)
        if fcntl:
            new = folder / "new"
            _locks[process] = os.open(new, os.O_CREAT | os.O_RDWR)
            fcntl.flock(_locks[process], fcntl.LOCK_EX)
            new.rename(folder / LOCK)  # the lock appears when it is held
    return str(_folders[process] / f"{next(_NUMBERS)}-{name}")


def _remove(process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(_folders[process], ignore_errors=True)


def _remove_abandoned() -> None:
    """Remove folders whose process was killed: those whose lock nobody holds."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}") if fcntl else ():
        try:
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except OSError:  # it is in use, of another user, or was removed just now
            continue
