"""Several tasks that one experiment trains: each has training rows of its own and is scored by itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from s2ft.files.writing import replace_file
from s2ft.reproduce.data import TrialData, find_file, trial_data
from s2ft.reproduce.recipe import check_keys
from s2ft.reproduce.results import file_digest
from s2ft.reproduce.training_options import TrainingOptions
from s2ft.reproduce.trial import Loaded, score_tasks
from s2ft.text.data import DataOptions, load_rows
from s2ft.text.scoring import KINDS
from s2ft.text.suites import LoadedTask, SuiteTask, find_suite, load_suite
from s2ft.train.options import option

KEYS = ("train", "where", "tests", "task")
KEPT = ("messages", "prompt", "completion", "text")  # fields of a row that training uses


@dataclass(kw_only=True)
class TaskOptions(TrainingOptions):
    """Options of the experiments on several tasks. The help text of each field describes it."""

    tasks: dict = option(
        text="by name: train, its files; where, a text that its rows contain; tests, tasks of the paper or files; "
        "task, the kind of tests that are files"
    )
    eval_steps: ClassVar[None] = None  # these experiments do not evaluate during the training
    eval_from: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, task in self.tasks.items():
            if not isinstance(task, Mapping):
                raise ValueError(f"task {name} must hold lines such as 'train: FILE', got {task!r}")
            check_keys(f"task {name}", task, KEYS)
            missing = [key for key in ("train", "tests") if not task.get(key)]
            if missing:
                raise ValueError(f"task {name} lacks {' and '.join(missing)}")
            if task.get("task") not in (None, *KINDS):
                raise ValueError(f"task {name}: task must be one of {', '.join(KINDS)}, got {task['task']!r}")

    @property
    def shared(self) -> dict[str, Any]:
        """The options of all runs that determine their results, with the contents of the data files."""
        left_out = ("tasks", "seeds", "data")
        found = {one.name: getattr(self, one.name) for one in fields(TaskOptions) if one.name not in left_out}
        return {**found, "tasks": {name: _contents(self, name) for name in self.tasks}}


def _contents(options: TaskOptions, name: str) -> dict[str, Any]:
    """A task with the contents of its files in place of their names."""
    tests = {test.name: [test.kind, _content(test.data)] for test in tests_of(options, name)}
    where = options.tasks[name].get("where")
    return {"train": [file_digest(file) for file in train_files(options, name)], "where": where, "tests": tests}


def _content(data: str) -> str:
    return file_digest(data) if Path(data).is_file() else data


def train_files(options: TaskOptions, name: str) -> list[str]:
    """Return the files of the training rows of a task.

    Raises:
        FileNotFoundError: One does not exist.
    """
    return [find_file(file, options.data, f"task {name}") for file in _list(options.tasks[name]["train"])]


def tests_of(options: TaskOptions, name: str) -> list[SuiteTask]:
    """Return the tests of a task.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A test is unknown.
    """
    task = options.tasks[name]
    words = []
    for word in map(str, _list(task["tests"])):
        inside = Path(options.data).expanduser() / word if options.data is not None else None
        words.append(str(inside) if inside is not None and inside.is_file() else word)
    try:
        return find_suite(words, options.data, task.get("task"))
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from error


def load_tests(options: TaskOptions) -> dict[str, list[LoadedTask]]:
    """Read the tests of all tasks and check that each row can be scored.

    Args:
        options: The tasks.

    Returns:
        The tests with their rows, by the name of the task.
    """
    return {name: load_suite(tests_of(options, name), options.test_limit) for name in options.tasks}


def task_data(options: TaskOptions, name: str, loaded: Loaded, seed: int, folder: Path) -> TrialData:
    """Return the training rows of a task as tokens.

    Args:
        options: The tasks.
        name: Name of the task.
        loaded: The model.
        seed: Seed of the order of the rows.
        folder: Folder for the chosen rows of a task that takes a part of a file.

    Raises:
        ValueError: No row contains the text `where`, or a row can't be used.
    """
    files, where = train_files(options, name), options.tasks[name].get("where")
    if where is not None:
        files = [_chosen(files, name, where, options.limit, folder)]
    how = {"seed": seed, "max_length": options.max_length, "limit": options.limit}
    return trial_data(files, loaded.model, loaded.tokenizer, loaded.prompt, **how)


def _chosen(files: list[str], name: str, where: str, limit: int | None, folder: Path) -> str:
    """Write the rows that contain a text to a file."""
    lines: list[str] = []
    for row in load_rows(DataOptions(data=files)):
        kept = {key: row[key] for key in KEPT if row.get(key) is not None}
        if where in _text(kept) and (limit is None or len(lines) < limit):
            lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    if not lines:
        raise ValueError(f"task {name}: no row of {', '.join(files)} contains {where!r}")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{name}.jsonl", "".join(lines).encode())
    return str(folder / f"{name}.jsonl")


def _text(value: Any) -> str:
    """All texts of a row, one after the other."""
    if isinstance(value, str):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return "\n".join(map(_text, parts))


def score(
    loaded: Loaded, model: Any, tests: Mapping[str, list[LoadedTask]], options: TaskOptions, folder: Path
) -> dict[str, float]:
    """Score a model on tasks.

    Args:
        loaded: The base, for the prompts.
        model: The model to score.
        tests: The tests of each task, see :func:`load_tests`.
        options: How answers are generated.
        folder: Folder of the answers.

    Returns:
        The accuracy of each task in percent: the mean over its tests.
    """
    return {name: score_tasks(loaded, model, suite, options, folder / name)["average"] for name, suite in tests.items()}


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
