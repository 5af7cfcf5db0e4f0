"""Temporary files of Arrow tables. They are removed when the process ends, and never stand in the cache of datasets."""

import atexit
import itertools
import os
import shutil
import tempfile
from pathlib import Path

_NUMBERS = itertools.count()
_folders: dict[int, Path] = {}  # by process, since a forked process must not remove the folder of its parent


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
        _folders[process] = Path(tempfile.mkdtemp(prefix="s2ft-data-"))
        atexit.register(_remove, process)
    return str(_folders[process] / f"{next(_NUMBERS)}-{name}")


def _remove(process: int) -> None:
    if process == os.getpid():
        shutil.rmtree(_folders[process], ignore_errors=True)
