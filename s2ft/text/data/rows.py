"""Load normalised rows: read sources, convert their rows, and report the rows that cannot be used."""

import itertools
import json
import logging
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import normpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft.config import refuse
from s2ft.packages import check_packages
from s2ft.text.data.data_options import DataOptions
from s2ft.text.data.forms import BadRow, normalised, pair, scored_prompt
from s2ft.text.data.sources import BUILDERS, SAVED, read_rows, scratch_folder

if TYPE_CHECKING:  # only the commands that read data import datasets
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHOWN = 3  # bad rows that a message shows
FEW = 1000  # rows that are read from a file at once


@dataclass(frozen=True)
class Shape:
    """What the normalised rows of a kind of training have.

    Attributes:
        columns: Names of the columns, which can hold any value. Each shape has "place", the file and the row.
        normalise: Function that converts a row: of the row, our names of its fields, and whether it is for evaluation.
    """

    columns: tuple[str, ...]
    normalise: Callable[[object, Mapping[str, str], bool], dict[str, Any]]


EXAMPLES = Shape(("messages", "prompt", "completion", "text", "answer", "tools", "place"), normalised)
PAIRS = Shape(("prompt", "chosen", "rejected", "tools", "place"), pair)
PROMPTS = Shape(("prompt", "columns", "place"), scored_prompt)


def load_rows(
    options: DataOptions,
    *,
    data: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    scored: bool = False,
    shape: Shape = EXAMPLES,
) -> "Dataset":
    """Load the rows of data sets in their normalised form.

    Args:
        options: The options of the data.
        data: Files, folders or names to read in place of those that the options name.
        split: The split to read. None reads `options.dataset_train_split`, and of `data` that the options train on
            `options.dataset_test_split`.
        limit: Read the first rows only. None reads as many as `options.limit` says.
        scored: Whether the rows are for evaluation. The output may then be empty if there is a field `answer`.
        shape: The kind of rows: by default examples with an answer.

    Returns:
        A datasets.Dataset in a temporary file. Each row has `messages`, or `prompt` and `completion`, or `text`, and
        perhaps `answer` and `tools`; the others are None. `place` names the file and the row.

    Raises:
        FileNotFoundError: A file does not exist.
        MissingPackages: The package datasets is not installed.
        ValueError: No data is named, a source cannot be read, rows cannot be used, or no row is left.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.text.data import DataOptions, load_rows
        >>> _ = Path("sums.jsonl").write_text('{"instruction": "2+3=", "output": 5}')
        >>> rows = load_rows(DataOptions(data=["sums.jsonl"]))
        >>> rows[0]["messages"], rows[0]["place"]
        ([{'role': 'user', 'content': '2+3='}, {'role': 'assistant', 'content': '5'}], 'sums.jsonl, line 1')
    """
    check_packages("reading data")
    from datasets import concatenate_datasets

    entries = _entries(options, data, split)
    if not entries:
        raise ValueError("no data was given: name files, folders or data sets with data (--data)")
    fractions = _fractions(entries)
    limit = options.limit if limit is None else limit
    parts = []
    for entry in entries:
        wanted = None if limit is None or fractions else limit - sum(map(len, parts))
        if wanted is not None and wanted <= 0:  # a slice has more
            break
        parts.append(_stored(entry, options, wanted, scored, shape))
    if fractions:
        total = min(math.inf if limit is None else limit, *(len(part) / share for part, share in zip(parts, fractions)))
        parts = [part.select(range(min(len(part), round(share * total)))) for part, share in zip(parts, fractions)]
    rows = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return rows.select(range(min(limit, len(rows)))) if limit is not None else rows


def load_split(
    options: DataOptions, *, seed: int, evaluates: bool = True, eval_limit: int | None = None, shape: Shape = EXAMPLES
) -> "tuple[Dataset, Dataset | None]":
    """Load the training rows and the held-out rows.

    Args:
        options: The options of the data.
        seed: Seed of the rows that `test_split_size` holds out.
        evaluates: Whether the run evaluates. If it does, its one data set has a test split and neither `eval_data` nor
            `test_split_size` is given, that split is read.
        eval_limit: Use the first held-out rows only.
        shape: The kind of rows.

    Returns:
        The training rows, and the held-out rows or None.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: See :func:`load_rows`. Or there are too few rows to hold out so many.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.text.data import DataOptions, load_split
        >>> _ = Path("sums.jsonl").write_text('{"question": "2+3=", "answer": 5}\\n' * 10)
        >>> train, held_out = load_split(DataOptions(data=["sums.jsonl"], test_split_size=0.2), seed=0)
        >>> len(train), len(held_out)
        (8, 2)
    """
    train, held_out_of = load_rows(options, shape=shape), replace(options, limit=eval_limit)
    if options.eval_data:
        return train, load_rows(held_out_of, data=options.eval_data, shape=shape)
    if options.test_split_size:
        size = options.test_split_size
        if size >= len(train):
            raise ValueError(f"test_split_size {size} must be smaller than the {len(train)} rows there are")
        parts = train.train_test_split(int(size) if size >= 1 else size, seed=seed)
        held_out = parts["test"]
        return parts["train"], held_out.select(range(min(eval_limit or len(held_out), len(held_out))))
    name = options.data[0] if len(options.data) == 1 else options.dataset_name
    place = Path(name or "").expanduser()
    is_one = "*" in place.name or place.is_file() or (place / SAVED).is_file()  # every split of it is the whole
    if evaluates and name and not is_one:
        return train, load_rows(held_out_of, split=options.dataset_test_split, shape=shape)
    return train, None


def _entries(options: DataOptions, data: Sequence[str] | None, split: str | None) -> list[dict[str, Any]]:
    """What is read, as the arguments of `read_rows` and the fraction of a mixture."""
    train = options.dataset_train_split
    if data is None and options.datasets:
        return [{"split": split or train, **entry} for entry in options.datasets]
    names = data if data is not None else options.data or [options.dataset_name] * bool(options.dataset_name)
    of_hub = {"name": options.dataset_config, "revision": options.dataset_revision}
    is_held_out = data is not None  # other rows of what is trained on, and all of another source
    known = (*options.data, options.dataset_name or "", *(one["path"] for one in options.datasets))
    trained = set(map(normpath, known if is_held_out else ()))
    other = train.partition("[")[0] if is_held_out else train
    test = options.dataset_test_split
    return [
        {"path": str(one), "split": split or (test if normpath(one) in trained else other), **of_hub} for one in names
    ]


def _fractions(entries: Sequence[dict[str, Any]]) -> list[float] | None:
    fractions = [entry.get("fraction") for entry in entries]
    if all(fraction is None for fraction in fractions):
        return None
    if not all(isinstance(fraction, (int, float)) and fraction > 0 for fraction in fractions):
        raise ValueError(f"datasets: fraction must be a positive number in every entry or in none, got {fractions}")
    return [fraction / sum(fractions) for fraction in fractions]


def _stored(entry: dict[str, Any], options: DataOptions, limit: int | None, scored: bool, shape: Shape):
    """Write the normalised rows of one entry to a temporary file and open it. The rows are never held in memory."""
    from datasets import Dataset, Features, ReadInstruction
    from datasets.arrow_writer import ArrowWriter

    from s2ft.text.data.columns import ExactJson

    # Token rows are a second file: whether rows need a chat template is known when all are read, and rows are held
    # out, answered and shown as they are.
    problems: list[str] = []
    features = Features({name: ExactJson("string") for name in shape.columns})
    path = str(scratch_folder() / f"{secrets.token_hex(8)}.arrow")
    is_local = entry["path"] in BUILDERS or "*" in entry["path"] or Path(entry["path"]).expanduser().exists()
    sliced = "[" in entry["split"] and is_local  # datasets takes the slice of a data set on the hub
    streaming = limit is not None and "[" not in entry["split"]  # so that the hub sends these rows only
    with ArrowWriter(features=features, path=path) as writer:
        rows = _converted(entry, options, scored, problems, shape, streaming)
        for row in itertools.islice(rows, None if sliced else limit):
            writer.write(row)
        count, _ = writer.finalize()
    check_bad_rows(problems, count, options.skip_bad_rows, entry["path"])
    found = Dataset.from_file(path)
    found.info.features = features
    if not sliced:
        return found
    (part,) = ReadInstruction.from_spec(entry["split"]).to_absolute({entry["split"].partition("[")[0]: count})
    taken = range(part.from_ or 0, count if part.to is None else part.to)
    if not taken:
        raise ValueError(f"the slice {entry['split']} has none of the {count} rows of {entry['path']}")
    return found.select(taken)


def form_of(rows, options: DataOptions) -> str:
    """Return the form of prompts for rows: "text" if all are texts, else "chat".

    Args:
        rows: Rows as :func:`load_rows` returns them.
        options: The options of the data, which may name the form. A chat template or a system prompt says "chat",
            unless all rows are whole texts.
    """
    if options.form != "auto":
        return options.form
    for_chats = options.chat_template is not None or options.system_prompt is not None
    cells = rows.select_columns([name for name in ("messages", "prompt") if name in rows.column_names])
    columns = (column for part in cells.with_format("arrow").iter(FEW) for column in part.columns)
    values = (value for column in columns for value in column.to_pylist() if value is not None)
    return "chat" if any(for_chats or str(value).startswith("[") for value in values) else "text"  # lists as JSON


def check_bad_rows(problems: Sequence[str], good: int, skip: bool, name: str = "the data") -> None:
    """Report the rows of a data set that cannot be used.

    Args:
        problems: What is wrong with each of them.
        good: Number of the other rows.
        skip: Whether they are left out. Otherwise they are an error.
        name: The data set, for the message.

    Raises:
        ValueError: There are bad rows that must not be left out, or there is no good row.
    """
    bad = len(problems)
    refuse((not bad and not good, f"{name} has no rows"))
    if not bad:
        return
    of = f"{bad} of {bad + good} row{'s' * (bad + good != 1)}"
    listed = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
    listed += f"\n  and {bad - SHOWN} more" if bad > SHOWN else ""
    refuse(
        (not skip, f"{of} can't be used; correct them, or leave them out with --skip-bad-rows:{listed}"),
        (not good, f"none of {bad} rows can be used:{listed}"),
    )
    logger.warning("left out %s that can't be used:%s", of, listed)


def _converted(
    entry: dict[str, Any], options: DataOptions, scored: bool, problems: list[str], shape: Shape, streaming: bool
) -> Iterator[dict[str, Any]]:
    """Read the rows of an entry, and yield the good ones in their normalised form."""
    renamed = options.renamed
    arguments = {name: value for name, value in entry.items() if name not in ("fraction", "columns")}
    for place, row in read_rows(**arguments, streaming=streaming):
        try:
            if isinstance(row, BadRow):
                raise row
            if entry.get("columns") and isinstance(row, Mapping):
                row = {name: value for name, value in row.items() if name in entry["columns"]}
            found = {**shape.normalise(row, renamed, scored), "place": place}
        except BadRow as error:
            problems.append(f"{place}: {error}" if len(problems) < SHOWN else "")  # there may be millions
        else:
            yield {name: json.dumps(found[name], default=str) if name in found else None for name in shape.columns}
