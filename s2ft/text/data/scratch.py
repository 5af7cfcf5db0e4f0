"""The folder for temporary Arrow files. It is removed when the process ends, and is never the cache of datasets.

datasets writes the files of later steps beside the first one. A process that is killed leaves its folder behind, and
the next process that makes one removes it.
"""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks, so folders of killed processes stay there
    fcntl = None  # type: ignore[assignment]

PREFIX, LOCK = "s2ft-data-", "in-use"


@functools.cache
def scratch_folder() -> Path:
    """Return the temporary folder of this process and of those that it forks. TMPDIR moves it.

    Example:
        >>> from s2ft.text.data.scratch import scratch_folder
        >>> scratch_folder().is_dir()
        True
    """
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}") if fcntl else ():
        _remove_if_abandoned(lock)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    atexit.register(_remove, folder, os.getpid())
    if fcntl:
        held = os.open(folder / "new", os.O_CREAT | os.O_RDWR)  # open as long as the process lives
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "new").rename(folder / LOCK)  # the lock appears when it is held
    return folder


def _remove(folder: Path, process: int) -> None:
    if process == os.getpid():  # a forked process must not remove the folder of its parent
        shutil.rmtree(folder, ignore_errors=True)


def _remove_if_abandoned(lock: Path) -> None:
    """Remove a folder whose lock nobody holds."""
    try:
        with lock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    except OSError:  # it is in use, of another user, or was removed just now
        pass
