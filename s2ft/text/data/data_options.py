"""Options that say which data is read and how. This module imports no PyTorch, so that ``--help`` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ft.config import check_fields, option, refuse

DATA = "files, folders, or names of data sets on the hub"
FILES = "json, jsonl, csv, tsv or parquet, also compressed"
TASKS = ("arithmetic", "commonsense", "exact")  # tasks whose generated answers can be scored


@dataclass
class DataOptions:
    """Which data is read, and how. The names `dataset_...`, `datasets` and `test_split_size` are TRL's.

    The help text of each field describes it, see `s2ft sft --help`.

    Raises:
        ValueError: A value is not allowed, or options contradict each other. The message names the field.

    Example:
        >>> from s2ft.text.data import DataOptions
        >>> DataOptions(data=["chats.jsonl"], field=["instruction=question"]).renamed
        {'question': 'instruction'}
    """

    data: list[str] = option([], f"files ({FILES}), folders, or names of data sets on the hub", metavar="FILE_OR_NAME")
    eval_data: list[str] = option([], "held-out data, as for --data", metavar="FILE_OR_NAME")
    dataset_name: str | None = option(None, "a file, a folder, or the name of a data set on the hub", metavar="NAME")
    dataset_config: str | None = option(None, "configuration of the data sets on the hub", metavar="NAME")
    dataset_train_split: str = option("train", "split to train on, such as train or train[:1000]", metavar="SPLIT")
    dataset_test_split: str = option(
        "test", "split to evaluate on, if the run evaluates and no --eval-data is given", metavar="SPLIT"
    )
    dataset_revision: str | None = option(None, "branch, tag or commit of the data sets on the hub", metavar="NAME")
    datasets: list[dict[str, Any]] = option(
        [],
        "a mixture, in a configuration file only: for each data set path, and optionally name, data_dir, data_files, "
        "split, revision, columns and fraction",
    )
    test_split_size: float | None = option(
        None,
        "rows to hold out from the training data: a share below 1, or a number of rows; 0 trains on all",
        metavar="SHARE",
        shown="s2ft sft holds out a twentieth of 100 rows or more, at most 64",
    )
    limit: int | None = option(None, "use the first N rows only", shown="all rows", least=1)
    field: list[str] = option(
        [],
        "other names of fields in the data, as OURS=THEIRS: instruction=question output=reply",
        metavar="OURS=THEIRS",
    )
    form: str = option(
        "auto",
        "chat puts every prompt into the chat template; text uses prompt, completion and text as they are; auto: text "
        "if all rows are texts",
        choices=("auto", "chat", "text"),
    )
    chat_template: str | None = option(
        None,
        "a file with a Jinja chat template, its text, or alpaca",
        metavar="FILE",
        shown="the tokenizer's template, or alpaca if it has none",
    )
    system_prompt: str | None = option(None, "system prompt of the chats that have none", metavar="TEXT")
    skip_bad_rows: bool = option(False, "leave out rows that can't be used; otherwise they are an error")
    too_long: str | None = option(
        None,
        "what happens to rows longer than --max-length",
        choices=("leave_out", "cut"),
        shown="chats are left out, plain texts are cut into several rows",
    )
    last_answer_only: bool = option(False, "compute the loss on the last answer of a chat only")

    def __post_init__(self) -> None:
        if isinstance(self.field, dict):  # in a configuration file
            self.field = [f"{ours}={theirs}" for ours, theirs in self.field.items()]
        for name in ("data", "eval_data", "field"):
            value = getattr(self, name)
            setattr(self, name, [str(value)] if isinstance(value, (str, Path)) else list(value or ()))
        check_fields(self)
        _ = self.renamed
        size = self.test_split_size
        given = [name for name in ("data", "dataset_name", "datasets") if getattr(self, name)]
        refuse(
            (
                size is not None and not (0 <= size < 1 or (size >= 1 and size == int(size))),
                f"test_split_size must be a share between 0 and 1 or a number of rows, got {size}",
            ),
            (
                size is not None and self.eval_data,
                "test_split_size and eval_data both say what to evaluate on: give one of them",
            ),
            (len(given) > 1, f"{' and '.join(given)} both say what to train on: give one of them"),
        )
        for number, entry in enumerate(self.datasets, 1):
            known = ("path", "name", "data_dir", "data_files", "split", "revision", "columns", "fraction")
            if not isinstance(entry, dict) or not entry.get("path"):
                raise ValueError(f"datasets, entry {number}: needs 'path', got {entry!r}")
            refuse(
                *(
                    (key not in known, f"datasets, entry {number}: unknown key {key!r}; known are {', '.join(known)}")
                    for key in entry
                )
            )

    @property
    def renamed(self) -> dict[str, str]:
        """Our name of a field, by its name in the data."""
        from s2ft.text.data.forms import FIELDS

        renamed = {}
        for pair in self.field:
            ours, equals, theirs = pair.partition("=")
            refuse(
                (
                    not (equals and ours and theirs),
                    f"field must be OUR_NAME=NAME_IN_THE_DATA, such as output=reply, got {pair!r}",
                ),
                (ours not in FIELDS, f"field: {ours!r} is no field of s2ft; choose from {', '.join(FIELDS)}"),
                (theirs in renamed, f"field: {theirs!r} has two meanings, {renamed.get(theirs)!r} and {ours!r}"),
            )
            renamed[theirs] = ours
        return renamed


@dataclass
class ReadingOptions:
    """How a command reads the data that its own options name.

    Example:
        >>> from s2ft.text.data.data_options import ReadingOptions
        >>> ReadingOptions(field=["question=q"]).of(["test.jsonl"], split="test").dataset_train_split
        'test'
    """

    split: str | None = option(None, "split of a folder or of a data set on the hub", metavar="SPLIT")
    field: list[str] = option(
        [], "other names of fields in the data, as OURS=THEIRS: instruction=question", metavar="OURS=THEIRS"
    )
    skip_bad_rows: bool = option(False, "leave out rows that can't be used; otherwise they are an error")

    def __post_init__(self) -> None:
        self.of(["data"], "train")  # ValueError for a wrong field

    def of(self, data: list[str], split: str, limit: int | None = None, beside: Any = None) -> DataOptions:
        """Return the options that :func:`s2ft.text.data.load_rows` takes.

        Args:
            data: Files, folders or names of data sets.
            split: The split that is read if the user names none.
            limit: Read the first rows only.
            beside: Data that the names of fields are for, if there is any.
        """
        return DataOptions(
            data=data,
            dataset_train_split=self.split or split,
            field=[] if beside else self.field,
            skip_bad_rows=self.skip_bad_rows,
            limit=limit,
        )
