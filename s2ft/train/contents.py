"""What a run reads, as hashes: a name of a file does not say whether its content is still the same.

By them `s2ft compare` knows which of its runs can stand in one table, and `--resume` that a run goes on with its rows.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from s2ft.model.checkpoint import hash_of_files
from s2ft.text.models import hub_revision, locate

BATCH = 1000  # rows that are in memory at once
OF_A_MODEL = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")  # files of a checkpoint


def hash_of_rows(rows: Any) -> str:
    """Return the SHA-256 of rows in their order. It does not depend on where they were read.

    Args:
        rows: A datasets.Dataset: rows as :func:`s2ft.text.data.load_rows` returns them, or token rows.
    """
    whole = hashlib.sha256()
    for digest in _digests(rows):
        whole.update(digest)
    return whole.hexdigest()


def count_of_trained(rows: Any, held_out: Any) -> int:
    """Return how many of the held-out rows stand in the training rows too.

    Args:
        rows: The training rows, a datasets.Dataset.
        held_out: The held-out rows, with the same columns.
    """
    searched = list(_digests(held_out))
    found = set(searched).intersection(_digests(rows))
    return sum(digest in found for digest in searched)


def hash_of_base(name: str, revision: str | None = None) -> str:
    """Return the SHA-256 of the files of a base, or the commit of one on the hub.

    Args:
        name: A folder, a .gguf file, or a name on the hub.
        revision: Branch, tag or commit on the hub; default: the main branch.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: It is no base, or the hub can't be asked.
    """
    source, options = locate(name)
    folder = Path(source).expanduser()
    if options:
        return hash_of_files([folder / options["gguf_file"]])
    if folder.is_dir():
        return hash_of_files(sorted(file for file in folder.iterdir() if file.suffix in OF_A_MODEL))
    return hub_revision(name, revision)


def _digests(rows: Any) -> Iterator[bytes]:
    """The hash of each row. The place from which a row was read is no part of it."""
    names = sorted(name for name in rows.column_names if name != "place")
    head = "\0".join(names).encode()
    for batch in rows.with_format("arrow").iter(BATCH):
        for cells in zip(*(_cells(batch[name]) for name in names)):
            row = hashlib.sha256(head)
            for cell in cells:
                row.update(len(cell).to_bytes(8, "little") + cell)
            yield row.digest()


def _cells(column: Any) -> Iterator[bytes]:
    """The bytes of each cell of an Arrow column. Token ids, of which there are many, never become Python's numbers."""
    import pyarrow

    for chunk in column.chunks:
        is_tokens = pyarrow.types.is_list(chunk.type) and pyarrow.types.is_integer(chunk.type.value_type)
        for cell in chunk:
            if is_tokens and cell.is_valid:
                yield cell.values.to_numpy(zero_copy_only=False).astype("int64").tobytes()
            else:
                yield json.dumps(cell.as_py(), default=str).encode()
