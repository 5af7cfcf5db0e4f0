"""Read the rows of files, folders and data sets of the hub, through the package datasets.

A source yields (place, row) pairs. The place names the file and the row or line for messages. JSON is decoded line by
line here: the JSON reader of datasets gives all rows the fields of all other rows, also inside tool calls and schemas.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ft.text.data.scratch import scratch_file

KINDS = {  # endings of files, and what reads them
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
BUILDERS = ("json", "csv", "parquet", "arrow")  # names of readers that TRL's configurations use as `path`
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
MARKS = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
         b"PAR1": "parquet", b"ARROW1": "arrow"}  # fmt: skip

Rows = Iterator[tuple[str, object]]


class UnreadableRow:
    """A row that is not even JSON. Its problem is reported with those of the other rows."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


@dataclass(frozen=True)
class Source:
    """A place that rows are read from.

    Attributes:
        name: The name in messages.
        rows: Function that reads the rows with their places, or None if there is a data set.
        dataset: A data set of the package datasets, or None.
    """

    name: str
    rows: Callable[[], Rows] | None = None
    dataset: Any = None

    def read(self) -> Rows:
        """Yield the rows with their places."""
        if self.rows is not None:
            yield from self.rows()
            return
        for number, row in enumerate(self.dataset, 1):
            yield f"{self.name}, row {number}", row


def quiet_datasets() -> None:
    """Turn off the progress bars of datasets if the output is no terminal, and its messages about caches."""
    import datasets

    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # one line for each retry
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def open_source(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    columns: list[str] | None = None,
    streaming: bool = False,
) -> list[Source]:
    """Find what a path or a name means, and open it.

    Args:
        path: A file, a folder, a data set of the hub, or "json", "csv" or "parquet" with `data_files`.
        split: The split. A single file is one split whatever its name.
        name: Configuration of a data set on the hub.
        revision: Branch, tag or commit on the hub.
        data_dir: Folder inside the data set.
        data_files: Files, as for datasets.load_dataset.
        columns: Fields to keep.
        streaming: Whether a data set of the hub is read without storing it.

    Returns:
        One source for each file, or one for the data set.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The file or the data set cannot be read.
    """
    quiet_datasets()
    local = Path(path).expanduser()
    if path in BUILDERS and data_files and not local.exists():
        sources = [_file(Path(file), path) for file in _listed(data_files, split, data_dir)]
    elif local.is_file():
        sources = [_file(local)]
    elif is_pattern(path) and not local.exists():
        sources = [_file(Path(file)) for file in _listed(path, split, data_dir)]
    elif local.is_dir():
        sources = _folder(local / data_dir if data_dir else local, split, data_files)
    elif _looks_like_a_path(path):
        raise FileNotFoundError(f"data file {path} doesn't exist")
    else:
        sources = [_hub(path, split, name, revision, data_dir, data_files, streaming)]
    return [_with_columns(source, columns) for source in sources] if columns else sources


def is_pattern(path: str) -> bool:
    """Whether a path stands for all files that match it, such as `data/*.jsonl`."""
    return "*" in path


def _looks_like_a_path(path: str) -> bool:
    ending = Path(path.removesuffix(next((end for end in COMPRESSED if path.endswith(end)), ""))).suffix
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or ending in KINDS or "\\" in path


def _with_columns(source: Source, columns: list[str]) -> Source:
    def rows() -> Rows:
        for place, row in source.read():
            yield place, {name: row[name] for name in columns if name in row} if isinstance(row, Mapping) else row

    return Source(source.name, rows)


def _listed(data_files: Any, split: str, data_dir: str | None) -> list[str]:
    """Return the files of a split. A name can have * in it."""
    import glob

    if isinstance(data_files, Mapping):
        base = split.partition("[")[0]
        if base not in data_files:
            raise ValueError(f"data_files has no split {base!r}; it has {', '.join(map(repr, data_files))}")
        data_files = data_files[base]
    names = [data_files] if isinstance(data_files, str) else list(data_files)
    paths = [str(Path(data_dir or "", name).expanduser()) for name in names]
    files = {path: sorted(glob.glob(path, recursive=True)) if is_pattern(path) else [path] for path in paths}
    for path, found in files.items():
        if not found:
            raise FileNotFoundError(f"no data file matches {path}")
    return [file for found in files.values() for file in found]


def _file(path: Path, kind: str | None = None) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"data file {path} doesn't exist")
    if not path.is_file():
        raise ValueError(f"data file {path} is not a file")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    packed = _packing(path)
    kind = kind or KINDS.get(Path(path.name.removesuffix(path.suffix if path.suffix in COMPRESSED else "")).suffix)
    if kind in (None, "json"):
        with path.open("rb") as file:
            mark = file.read(8)
        kind = next((found for start, found in MARKS.items() if mark.startswith(start) and found in BUILDERS), kind)
    if kind is None:
        if path.suffix == ".txt":
            raise ValueError(f'{path} is plain text: write JSON lines such as {{"text": "..."}}')
        kind = "json"
    if kind == "json":
        return Source(str(path), lambda: _json(path, packed))
    return Source(str(path), lambda: _table(path, kind, packed))


def _packing(path: Path) -> str | None:
    """The compression of a file, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(8)
    found = next((kind for mark, kind in MARKS.items() if start.startswith(mark)), None)
    return None if found in BUILDERS else found


def _json(path: Path, packed: str | None) -> Rows:
    """Read JSON lines, a JSON list, or an object with one list of rows. Only lines are read piece by piece."""
    import fsspec

    try:
        with fsspec.open(path, "rt", encoding="utf-8-sig", compression=packed) as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if not first:
                raise ValueError(f"{path} is empty")
            whole = first.lstrip().startswith("[") or not _is_json(first)
            if whole and (rows := _document(path, file.read())) is not None:
                yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
                return
            file.seek(0)
            yield from _lines(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (EOFError, OSError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(path: Path, file: Iterable[str]) -> Rows:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = UnreadableRow(f"not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:
            row = UnreadableRow(_why_not_read(error))
        rows = _rows_of_object(row)
        if rows is None:
            yield f"{path}, line {number}", row
        else:
            yield from ((f"{path}, row {at}", inner) for at, inner in enumerate(rows, 1))


def _document(path: Path, text: str) -> list | None:
    """The rows of a JSON list, or of an object with one list. None if the text is neither, so that lines are read."""
    is_list = text.lstrip().startswith("[")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if is_list:
            raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
        return None
    except (RecursionError, ValueError) as error:
        if is_list:
            raise ValueError(f"{path}, row {_row_that_fails(text)}: {_why_not_read(error)}") from None
        return None
    rows = found if isinstance(found, list) else _rows_of_object(found)
    if rows is not None and not rows:
        raise ValueError(f"{path} has no rows")
    return [found] if rows is None else rows


def _rows_of_object(found: object) -> list | None:
    """The rows of an object such as {"data": [...]}: its only list of objects."""
    if not isinstance(found, Mapping):
        return None
    from s2ft.text.data.forms import FIELDS

    lists = [value for name, value in found.items() if isinstance(value, list) and name not in FIELDS]
    if len(lists) != 1 or any(name in FIELDS for name in found) or not lists[0]:
        return None
    return lists[0] if all(isinstance(row, Mapping) for row in lists[0]) else None


def _row_that_fails(text: str) -> int:
    """Return the number of the first row, from 1, of a JSON list that Python cannot read."""
    decoder, at, row = json.JSONDecoder(), text.index("[") + 1, 1
    while True:
        while text[at].isspace() or text[at] == ",":
            at += 1
        try:
            _, at = decoder.raw_decode(text, at)
        except (RecursionError, ValueError):
            return row
        row += 1


def _why_not_read(error: Exception) -> str:
    """Explain why Python refuses well-formed JSON: the nesting is too deep, or a number is too long."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else f"a number is too long ({error})"


def _table(path: Path, kind: str, packed: str | None) -> Rows:
    """Read a table piece by piece."""
    try:
        rows = _cells(path, kind, packed) if kind in ("csv", "tsv") else _columns(path, kind)
        for number, row in enumerate(rows, 1):
            yield f"{path}, row {number}", row
    except Exception as error:  # pyarrow and pandas raise many kinds
        raise ValueError(f"{path} can't be read as {kind}: {_reason(error)}") from error


def _cells(path: Path, kind: str, packed: str | None) -> Iterator[dict[str, str]]:
    """The rows of a CSV file. All cells are text, so that 007 stays 007. The reader of datasets can't do that."""
    import pandas

    separator = "\t" if kind == "tsv" else ","
    options = {"dtype": str, "keep_default_na": False, "compression": packed}
    for part in pandas.read_csv(path, sep=separator, chunksize=10_000, **options):
        yield from part.to_dict("records")


def _columns(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    import datasets

    cache = str(Path(scratch_file("cache")).parent)  # for lock files
    yield from datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True, cache_dir=cache)


def _reason(error: BaseException) -> str:
    """Return the first line of the innermost reason of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _folder(path: Path, split: str, data_files: Any) -> list[Source]:
    import datasets
    from datasets.data_files import DataFilesPatternsDict, get_data_patterns

    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            found = _split_of(found, split, str(path))
        return [Source(str(path), dataset=found)]
    if data_files:
        return [_file(Path(file)) for file in _listed(data_files, split, str(path))]
    try:
        patterns = get_data_patterns(str(path))
    except Exception:
        patterns = {}
    files = DataFilesPatternsDict.from_patterns(patterns).resolve(str(path)) if patterns else {}
    by_split = {name: [Path(file) for file in found if _is_data(Path(file))] for name, found in files.items()}
    by_split = {name: found for name, found in by_split.items() if found}
    if not by_split:
        raise ValueError(f"data folder {path} has no file of the kinds {', '.join(KINDS)}")
    base = split.partition("[")[0]
    if base not in by_split:
        raise ValueError(
            f"data folder {path} has no split {base!r}; it has {', '.join(repr(str(name)) for name in by_split)}"
        )
    return [_file(file) for file in by_split[base]]


def _is_data(path: Path) -> bool:
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name
    return Path(name).suffix in KINDS and name not in ("dataset_info.json", "dataset_infos.json")


def _split_of(found: Mapping[str, Any], split: str, name: str) -> Any:
    base = split.partition("[")[0]
    if base not in found:
        raise ValueError(f"data set {name} has no split {base!r}; it has {', '.join(map(repr, found))}")
    return found[base]


def _hub(
    path: str,
    split: str,
    name: str | None,
    revision: str | None,
    data_dir: str | None,
    data_files: Any,
    streaming: bool,
) -> Source:
    import datasets
    from huggingface_hub.constants import is_offline_mode

    try:
        found = datasets.load_dataset(
            path, name, split=split, revision=revision, data_dir=data_dir, data_files=data_files, streaming=streaming
        )
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
    return Source(path, dataset=found)
