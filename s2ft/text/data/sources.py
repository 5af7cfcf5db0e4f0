"""Read the rows of files, folders and data sets of the hub, as pairs of a place and a row.

The place names the file and the row or line for messages. The package datasets reads tables and the hub, and finds the
files of a folder's splits. JSON is decoded here and CSV by pandas. The reader of datasets 5.2 was tried: it rounds
numbers to nine digits, turns 1 into 1.0 beside 2.5, refuses a field that the first 10 MB lack, stops at a broken line
without its number, and makes 7 of 007.
"""

import atexit
import contextlib
import functools
import glob
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from s2ft.config import refuse
from s2ft.files.plain_text import first_line
from s2ft.text.data.forms import FIELDS, BadRow

KINDS = {  # endings of files, and what reads them
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
LONGEST_CSV_LINE = 64 * 2**20  # in bytes
INFOS = ("dataset_info.json", "dataset_infos.json")  # what `datasets` writes beside the data
SAVED = "state.json"  # in the folder of one split that `datasets` has saved
BUILDERS = ("json", "csv", "parquet", "arrow")  # names of readers that TRL's configurations use as `path`
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
SCRATCH = "s2ft-data-"  # how the names of temporary folders begin
IN_USE = "in-use"  # a file in such a folder, which its process holds locked
OTHERS = {  # endings of files that are not read, and what to do
    ".txt": 'is plain text: write JSON lines such as {"text": "..."}',
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet: save it as CSV"),
}
logger = logging.getLogger(__name__)

Rows = Iterator[tuple[str, object]]


def read_rows(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    streaming: bool = False,
) -> Rows:
    """Find what a path or a name means, and read its rows, one after another.

    Args:
        path: A file, a folder, a data set of the hub, or "json", "csv" or "parquet" with `data_files`.
        split: The split. A single file is one split whatever its name.
        name: Configuration of a data set on the hub.
        revision: Branch, tag or commit on the hub.
        data_dir: Folder inside the data set.
        data_files: Files, as for datasets.load_dataset.
        streaming: Whether a data set of the hub is read without storing it.

    Returns:
        The rows with their places.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The file or the data set cannot be read.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # one line for each retry
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    local = Path(path).expanduser()
    if path in BUILDERS and data_files and not local.exists():
        return _files(_listed(data_files, split, data_dir), path)
    if local.is_file():
        return _files([local])
    if "*" in path and not local.exists():
        return _files(_listed(path, split, data_dir))
    if local.is_dir():
        return _folder(local / data_dir if data_dir else local, split, data_files)
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path or _kind(Path(path)):
        raise FileNotFoundError(f"data file {path} doesn't exist")
    options = {"split": split, "revision": revision, "data_dir": data_dir, "data_files": data_files}
    return _hub(path, name, **options, streaming=streaming)


def _numbered(name: object, rows: Iterable) -> Rows:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _without_nulls(value) for name, value in found.items()}  # a null of the row itself is its own


def _without_nulls(found: Any) -> Any:
    """A value of a table without the nulls that Arrow puts where an object lacks a name that another one has."""
    if isinstance(found, Mapping):
        return {name: _without_nulls(value) for name, value in found.items() if value is not None}
    if isinstance(found, list) and not isinstance((found or [0])[0], (int, float)):
        return [*map(_without_nulls, found)]
    return found


# ---- files ---------------------------------------------------------------------------------------------


def _listed(data_files: Any, split: str, data_dir: str | None) -> list[Path]:
    """Return the files of a split. A name can have * in it."""
    if isinstance(data_files, Mapping):
        data_files = _split_of(data_files, split, "data_files")
    found = []
    for name in [data_files] if isinstance(data_files, str) else data_files:
        path = str(Path(data_dir or "", name).expanduser())
        files = sorted(glob.glob(path, recursive=True)) if "*" in path else [path]
        if not files:
            raise FileNotFoundError(f"no data file matches {path}")
        found += map(Path, files)
    return found


def _split_of(found: Mapping[str, Any], split: str, name: str) -> Any:
    base = split.partition("[")[0]
    if base not in found:
        raise ValueError(f"{name} has no split {base!r}; it has {', '.join(repr(str(key)) for key in found)}")
    return found[base]


def _kind(path: Path) -> str | None:
    """What reads a file, by its ending before one of compression."""
    return KINDS.get(Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.lower())


def _files(paths: Iterable[Path], kind: str | None = None) -> Rows:
    return itertools.chain.from_iterable([_file(path, kind) for path in paths])


def _file(path: Path, kind: str | None) -> Rows:
    if not path.exists():
        raise FileNotFoundError(f"data file {path} doesn't exist")
    refuse((not path.is_file(), f"data file {path} is not a file"), (not path.stat().st_size, f"{path} is empty"))
    kind = kind or _kind(path)
    if kind is None and path.suffix in OTHERS:
        raise ValueError(f"{path} {OTHERS[path.suffix]}")
    return _json(path) if kind in (None, "json") else _table(path, kind)


def _table(path: Path, kind: str) -> Rows:
    """Read a table piece by piece. All cells of a CSV file are text, so that 007 stays 007."""
    import datasets
    import pandas

    try:
        if kind in ("csv", "tsv"):
            _check_line_lengths(path)
            separator = "\t" if kind == "tsv" else ","
            options = {"dtype": str, "keep_default_na": False}
            names = pandas.read_csv(path, sep=separator, nrows=0, **options).columns
            if len(names) == 1 and ";" in names[0]:  # as spreadsheets save CSV where a comma is the decimal sign
                separator = ";"
            parts = pandas.read_csv(path, chunksize=10_000, sep=separator, **options)
            rows = (row for part in parts for row in _told_of_missing(path, part).to_dict("records"))
        else:
            cache = str(scratch_folder())  # for files of locks, in place of the user's
            rows = datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, cache_dir=cache)
        yield from _numbered(path, map(_row, rows))
    except Exception as error:  # pyarrow and pandas raise many kinds
        raise ValueError(f"{path} can't be read as {kind}: {_reason(error)}") from error


def _check_line_lengths(path: Path) -> None:
    """Find a line that no row needs, for which pandas would take several times its memory.

    Raises:
        ValueError: A line is longer than LONGEST_CSV_LINE.
    """
    import fsspec

    length = 0
    line_breaks = 0
    with fsspec.open(path, "rb", compression="infer") as file:
        while block := file.read(2**20):
            line_breaks += block.count(b"\n")
            if b"\n" in block:
                length = len(block) - block.rfind(b"\n") - 1
            else:
                length += len(block)
            if length > LONGEST_CSV_LINE:
                raise ValueError(
                    f"line {line_breaks + 1} has more than {LONGEST_CSV_LINE >> 20} MiB: is a line break missing?"
                )


def _told_of_missing(path: Path, part: Any) -> Any:
    """Return a part of a table. Warn of cells that a program wrote for a missing value and that are read as text.

    Raises:
        ValueError: The rows are longer than the first line. pandas would take their first cells for names of rows.
    """
    if type(part.index).__name__ != "RangeIndex":
        raise ValueError("rows have more fields than the first line: quote a cell that holds the separator")
    missing = part.isin(["NaN", "nan"]).any()
    if missing.any():
        names = ", ".join(map(repr, part.columns[missing]))
        logger.warning("%s: cells of %s say NaN, and are read as this word: leave a missing cell empty", path, names)
    return part


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost reason of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


# ---- JSON ----------------------------------------------------------------------------------------------


def _json(path: Path) -> Rows:
    """Read JSON lines, a JSON list, or an object with one list of rows. Only lines are read piece by piece."""
    import fsspec

    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig", compression="infer") as file:
            first, second = (next((line for line in file if line.strip()), "") for _ in range(2))
            named_lines = {".jsonl", ".ndjson"} & {*path.suffixes}
            if not first:
                raise ValueError(f"{path} is empty")
            is_list = first.lstrip().startswith("[")
            is_lines = (second or named_lines) and not is_list and not isinstance(_decoded(first), BadRow)
            file.seek(0)
            rows = None if is_lines else _document(path, file.read())
            file.seek(0)
            yield from _lines(path, file) if rows is None else _numbered(path, rows)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _decoded(text: str) -> object:
    """What a text says as JSON. A BadRow in its place is reported with those of the other rows."""
    try:
        return json.loads(text)
    except (RecursionError, ValueError) as error:
        return BadRow(_problem(error))


def _problem(error: RecursionError | ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} (character {error.colno})"
    return "it is nested too deeply" if isinstance(error, RecursionError) else f"a number is too long ({error})"


def _lines(path: Path, file: Iterable[str]) -> Rows:
    return ((f"{path}, line {number}", _decoded(line)) for number, line in enumerate(file, 1) if line.strip())


def _document(path: Path, text: str) -> list | None:
    """The rows of a JSON list, or of an object with one list. None if the text is neither, so that lines are read."""
    try:
        found = json.loads(text)
    except (RecursionError, ValueError) as error:
        if not text.lstrip().startswith("["):
            return None
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{line}: {_problem(error)}") from error
    rows = found if isinstance(found, list) else _rows_of_object(found)
    return [found] if rows is None else rows


def _rows_of_object(found: object) -> list | None:
    """The rows of an object such as {"data": [...]}: its only list of objects."""
    if not isinstance(found, Mapping) or any(name in FIELDS for name in found):
        return None
    lists = [value for value in found.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 and lists[0] and all(isinstance(row, Mapping) for row in lists[0]) else None


# ---- folders and the hub -------------------------------------------------------------------------------


def _folder(path: Path, split: str, data_files: Any) -> Rows:
    import datasets
    from datasets.data_files import DataFilesPatternsDict, get_data_patterns

    if (path / "dataset_dict.json").is_file() or (path / SAVED).is_file():
        found = datasets.load_from_disk(str(path))
        is_dict = isinstance(found, datasets.DatasetDict)
        return _numbered(path, map(_row, _split_of(found, split, f"data set {path}") if is_dict else found))
    if data_files:
        return _files(_listed(data_files, split, str(path)))
    try:
        files = DataFilesPatternsDict.from_patterns(get_data_patterns(str(path))).resolve(str(path))
    except Exception:  # an empty folder
        files = {}
    found = {name: [file for file in map(Path, names) if _kind(file) and not file.name.startswith(INFOS)]
             for name, names in files.items()}  # fmt: skip
    found = {name: names for name, names in found.items() if names}
    if not found:
        raise ValueError(f"data folder {path} has no file of the kinds {', '.join(KINDS)}")
    taken = {file.resolve() for names in found.values() for file in names}
    rest = [file for file in path.iterdir() if file.resolve() not in taken and not file.name.startswith(INFOS)]
    if skipped := [file.name for file in rest if file.suffix in OTHERS or _kind(file)]:
        logger.warning("data folder %s: %s: not read", path, ", ".join(sorted(skipped)))
    return _files(_split_of(found, split, f"data folder {path}"))


def _hub(path: str, *name: str | None, **options: Any) -> Rows:
    import datasets
    from huggingface_hub.constants import is_offline_mode

    try:
        found = datasets.load_dataset(path, *name, **options)
    except Exception as error:  # the hub, the network and each reader have their own kinds of errors
        way_out = (
            "HF_HUB_OFFLINE is set, so only what was downloaded before can be used"
            if is_offline_mode()
            else "without a network, set HF_HUB_OFFLINE=1 to use what was downloaded before"
        )
        raise ValueError(
            f"data set {path} can't be loaded: there is no such file or folder here, and the hub says: "
            f"{_reason(error).rstrip('.')}; {way_out}"
        ) from error
    return _numbered(path, map(_row, found))


# ---- temporary files ------------------------------------------------------------------------------------


try:
    import fcntl
except ImportError:  # Windows has no such locks, so the folders of killed processes stay there
    fcntl = None  # type: ignore[assignment]


@functools.cache
def scratch_folder() -> Path:
    """Return the temporary folder of this process and of those that it forks. TMPDIR moves it.

    The first call removes the folders of processes that were killed, which could not remove their own.

    Example:
        >>> from s2ft.text.data.sources import scratch_folder
        >>> scratch_folder().is_dir()
        True
    """
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
    atexit.register(_remove, folder, os.getpid())
    # The lock gets its name when it is held, so that nobody finds it free before. It stays open until the process ends.
    if fcntl is not None:
        lock = os.open(folder / "new", os.O_CREAT | os.O_RDWR)
        with contextlib.suppress(OSError):  # a file system without locks, where folders of killed processes stay too
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / IN_USE)
    return folder


def _remove_abandoned() -> None:
    if fcntl is None:
        return
    for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*/{IN_USE}"):
        with contextlib.suppress(OSError), path.open("r+") as lock:  # suppressed: in use, or of another user
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def _remove(folder: Path, process: int) -> None:
    if process == os.getpid():  # a forked process must not remove the folder of its parent
        shutil.rmtree(folder, ignore_errors=True)
