"""Suites: several tasks that are scored one after the other with one model.

The suites of the paper are found in a checkout of LLM-Adapters (``DIR/dataset/NAME/test.json``), and in folders with
files such as ``NAME.test.jsonl``, ``NAME/test.json`` and ``NAME.json``.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft.text.scoring import CHOICES, KINDS

if TYPE_CHECKING:  # it imports PyTorch, and the commands need only the names for their help
    from s2ft.text.evaluation import Evaluation

# The tasks of the paper in the order of its tables, and the names of their folders and files beside these names.
PAPER = {
    "arithmetic": {"MultiArith": (), "GSM8K": (), "AddSub": (), "AQuA": (), "SingleEq": (), "SVAMP": (), "MAWPS": ()},
    "commonsense": {
        "BoolQ": (),
        "PIQA": (),
        "SIQA": ("social_i_qa", "SocialIQA"),
        "HellaSwag": (),
        "WinoGrande": ("Wino",),
        "ARC-e": ("ARC-Easy",),
        "ARC-c": ("ARC-Challenge",),
        "OBQA": ("openbookqa",),
    },
}
SUFFIXES = tuple(
    f"{kind}{packed}" for kind in (".json", ".jsonl", ".parquet", ".csv", ".tsv") for packed in ("", ".gz")
)
SCORINGS = ("generation", "likelihood")


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite.

    Attributes:
        name: Its name in tables.
        kind: "arithmetic", "commonsense" or "choices", see `s2ft.text.scoring`.
        data: The file of its rows, or the name of a data set on the hub.
    """

    name: str
    kind: str
    data: str


@dataclass(frozen=True)
class LoadedTask:
    """A task and its rows.

    Attributes:
        task: The task.
        examples: Its rows, as :func:`s2ft.text.examples.read_examples` returns them.
    """

    task: SuiteTask
    examples: tuple


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        name: The task's name.
        accuracy: Share of right answers among the answered rows.
        right: Number of right answers.
        of: Number of answered rows.
        left_out: Number of rows that did not fit into the model's context.
        seconds: Time of the scoring.
        records: The answered rows, as values that JSON can hold.
    """

    name: str
    accuracy: float
    right: int
    of: int
    left_out: int
    seconds: float
    records: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name.

        Returns:
            Values that JSON can hold.
        """
        return {**asdict(self), "records": [dict(record) for record in self.records]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskResult":
        """Return the result that :meth:`to_dict` described.

        Args:
            values: The fields by name.

        Returns:
            The result.
        """
        return cls(**{**values, "records": tuple(values["records"])})


def average(results: Sequence[TaskResult]) -> float:
    """Return the mean of the accuracies of tasks, as in the paper's tables: each task counts the same.

    Args:
        results: The results of the tasks, at least one.

    Example:
        >>> from s2ft.text.suites import TaskResult, average
        >>> average([TaskResult("a", 0.5, 1, 2, 0, 1.0), TaskResult("b", 1.0, 30, 30, 0, 9.0)])
        0.75
    """
    return sum(result.accuracy for result in results) / len(results)


# ---- finding tasks -------------------------------------------------------------------------------------


def find_suite(
    words: Sequence[str],
    folder: str | Path | None = None,
    kind: str | None = None,
    split: str = "test",
    skip_missing: bool = False,
) -> list[SuiteTask]:
    """Find the tasks of a suite.

    Args:
        words: Suites or tasks of the paper by name, in any case; YAML files that list tasks; or files with rows.
        folder: The folder with the files of the paper's tasks.
        kind: The kind of task of files with rows.
        split: The part of a task's name or folder that says which rows a file has.
        skip_missing: Leave out tasks of the paper that have no file in the folder.

    Returns:
        The tasks in the order of the words. Tasks of the paper are in the order of its tables.

    Raises:
        FileNotFoundError: The folder or a file does not exist, or tasks have no file. The message names the tasks.
        ValueError: No word was given, a word is unknown, a YAML file lists no tasks, two tasks have one name, or a task
            has several files.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.text.suites import find_suite
        >>> _ = Path("BoolQ.test.jsonl").write_text('{"instruction": "Is 2 + 3 = 5?", "output": "true"}')
        >>> [task.name for task in find_suite(["commonsense"], ".", skip_missing=True)]
        ['BoolQ']
    """
    if not words:
        raise ValueError("no suite was given: name arithmetic, commonsense, a task of theirs, or files")
    found: list[SuiteTask | str] = []  # of a task without a file its name
    for word in words:
        paper = _of_paper(word)
        if paper:
            found += [_paper_task(name, of, folder, split) for name, of in paper]
        elif Path(word).suffix in (".yaml", ".yml"):
            found += read_suite_file(word)
        else:
            found.append(_file_task(word, kind))
    missing = [task for task in found if isinstance(task, str)]
    tasks = [task for task in found if isinstance(task, SuiteTask)]
    if missing and not (skip_missing and tasks):
        raise FileNotFoundError(
            f"{folder} has no {split} rows of {', '.join(missing)}: looked for {missing[0]}/{split}.json, "
            f"{missing[0]}.{split}.jsonl and the like, there and in dataset/"
            + ("; --skip-missing scores the others" if tasks else "")
        )
    twice = sorted({task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1})
    if twice:
        raise ValueError(f"two tasks have the name {twice[0]}: give names in a YAML file of tasks")
    return tasks


def missing_tasks(words: Sequence[str], tasks: Sequence[SuiteTask]) -> list[str]:
    """Return the tasks of the paper that the words name and that were not found.

    Args:
        words: As in :func:`find_suite`.
        tasks: What :func:`find_suite` returned.
    """
    names = {task.name for task in tasks}
    return [name for word in words for name, _ in _of_paper(word) if name not in names]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _of_paper(word: str) -> list[tuple[str, str]]:
    """The tasks of the paper that a word names, each with its suite."""
    if Path(word).suffix in SUFFIXES or Path(word).name != word:
        return []  # the name of a file
    every = [(name, suite) for suite, names in PAPER.items() for name in names]
    return [(name, suite) for name, suite in every if _plain(word) in (_plain(suite), *_names(name, suite))]


def _names(name: str, suite: str) -> list[str]:
    return [_plain(one) for one in (name, *PAPER[suite][name])]


def _paper_task(name: str, suite: str, folder: str | Path | None, split: str) -> SuiteTask | str:
    if folder is None:
        raise ValueError(
            f"the rows of {name} are not part of s2ft: give the folder with them by --data, such as a checkout of "
            "github.com/AGI-Edgerunners/LLM-Adapters"
        )
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data {folder} is no folder, and a suite needs the folder with the files of its tasks")
    for place in (root / "dataset", root, root / suite):
        files = sorted({file for file in _files(place, split) if _task_of(file, place, split) in _names(name, suite)})
        if len(files) > 1:
            raise ValueError(f"{name} has several files: {', '.join(map(str, files))}; keep one, or name it as a file")
        if files:
            return SuiteTask(name, suite, str(files[0]))
    return name


def _files(place: Path, split: str) -> Iterable[Path]:
    """Files of rows in a folder, and those named by the split in its folders."""
    for entry in sorted(place.iterdir()) if place.is_dir() else ():
        if entry.is_dir():
            yield from (file for suffix in SUFFIXES if (file := entry / f"{split}{suffix}").is_file())
        elif entry.name.endswith(SUFFIXES):
            yield entry


def _task_of(file: Path, place: Path, split: str) -> str:
    """The plain name of a file's task: that of its folder, or its own up to the split. Another split is no task."""
    if file.parent != place:
        return _plain(file.parent.name)
    stem = file.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        stem = stem.removesuffix(suffix)
    found = re.fullmatch(r"(.+)[-_.]([^-_.]+)", stem)
    return _plain(found[1] if found and found[2] == split else stem)


def _file_task(word: str, kind: str | None) -> SuiteTask:
    if not Path(word).expanduser().exists():
        known = ", ".join(name for names in PAPER.values() for name in names)
        raise FileNotFoundError(
            f"{word!r} is neither a suite (arithmetic, commonsense), nor a task of one ({known}), nor a file"
        )
    if kind is None:
        raise ValueError(f"the kind of task of {word} is not known: give --task, or a YAML file that lists the tasks")
    name = Path(word).name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return SuiteTask(name, kind, word)


def read_suite_file(path: str | Path) -> list[SuiteTask]:
    """Read the tasks of a YAML file.

    Args:
        path: A file with a list `tasks`. Each has `file`, relative to the YAML file, and `task`: arithmetic,
            commonsense or choices. `name` is the file's name if it is not given.

    Returns:
        The tasks.

    Raises:
        FileNotFoundError: The file, or a file that it names, does not exist.
        ValueError: The file can't be read, or a task is not complete.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.text.suites import read_suite_file
        >>> _ = Path("sums.jsonl").write_text('{"question": "2+3=", "answer": 5}')
        >>> _ = Path("mine.yaml").write_text("tasks: [{file: sums.jsonl, task: arithmetic}]")
        >>> read_suite_file("mine.yaml")
        [SuiteTask(name='sums', kind='arithmetic', data='sums.jsonl')]
    """
    import yaml

    path = Path(path).expanduser()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"suite {path} can't be read as YAML: {' '.join(str(error).split())}") from error
    entries = found.get("tasks") if isinstance(found, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"suite {path} must have a list 'tasks' with 'file' and 'task' for each")
    tasks = []
    for number, entry in enumerate(entries, 1):
        place = f"suite {path}, task {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str):
            raise ValueError(f"{place} needs 'file', got {entry!r}")
        unknown = sorted(set(map(str, entry)) - {"name", "file", "task"})
        if unknown:
            raise ValueError(f"{place} has the unknown key {unknown[0]!r}: known are name, file and task")
        if entry.get("task") not in KINDS:
            raise ValueError(f"{place}: task must be one of {', '.join(KINDS)}, got {entry.get('task')!r}")
        file = Path(entry["file"]).expanduser()
        if not (path.parent / file).exists():
            raise FileNotFoundError(f"{place}: file {path.parent / file} doesn't exist")
        task = _file_task(str(path.parent / file), entry["task"])
        tasks.append(replace(task, name=str(entry["name"])) if entry.get("name") else task)
    return tasks


# ---- reading and scoring -------------------------------------------------------------------------------


def load_suite(
    tasks: Sequence[SuiteTask],
    limit: int | None = None,
    scoring: str | None = None,
    reading: Callable[[list[str], str, int | None], Any] | None = None,
) -> list[LoadedTask]:
    """Read the rows of all tasks and check that each can be scored. No model is needed yet.

    Args:
        tasks: The tasks.
        limit: Read the first rows of each task only.
        scoring: As in :func:`scoring_of`.
        reading: :meth:`s2ft.text.data.options.ReadingOptions.of`, or None to read the rows as they are.

    Returns:
        The tasks with their rows.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A row can't be read or scored. The message names the task.
    """
    from s2ft.text.data.options import ReadingOptions
    from s2ft.text.examples import read_examples

    for task in tasks:
        scoring_of(task, scoring)
    loaded = []
    for task in tasks:
        options = (reading or ReadingOptions().of)([task.data], "test", limit)
        loaded.append(LoadedTask(task, tuple(read_examples(options))))
        check_rows(loaded[-1], scoring)
    return loaded


def scoring_of(task: SuiteTask, scoring: str | None) -> str:
    """Return how a task is scored.

    Args:
        task: The task.
        scoring: "generation" or "likelihood". None is generation, and likelihood for tasks of the kind choices.

    Raises:
        ValueError: The scoring is unknown, or the task can't be scored so.
    """
    if scoring is None:
        return "likelihood" if task.kind == CHOICES else "generation"
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if task.kind == CHOICES and scoring == "generation":
        raise ValueError(f"task {task.name} has the kind choices, which needs scoring likelihood")
    return scoring


def check_rows(loaded: LoadedTask, scoring: str | None = None) -> None:
    """Check that every row of a task can be scored.

    Args:
        loaded: The task.
        scoring: As in :func:`scoring_of`.

    Raises:
        ValueError: A row can't be scored. The message has its number.
    """
    from s2ft.text.scoring import allowed_answers, right_answer

    check = allowed_answers if scoring_of(loaded.task, scoring) == "likelihood" else right_answer
    for number, example in enumerate(loaded.examples, 1):
        try:
            check(example, loaded.task.kind)
        except ValueError as error:
            raise ValueError(f"{loaded.task.data or 'the data'}, example {number}: {error}") from None


def evaluate_task(
    model,
    prompter,
    loaded: LoadedTask,
    *,
    num_beams: int = 1,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    scoring: str | None = None,
    length_normalized: bool = False,
    answer_form: str | None = None,
) -> "Evaluation":
    """Score a model on one task.

    Args:
        model: A causal language model, with or without an adapter.
        prompter: The :class:`s2ft.text.adapter_prompts.Prompter` that makes the prompts, or any object with its
            `tokenizer` and `format`.
        loaded: The task.
        num_beams: Number of beams of generated answers. The paper uses 4. 1 is greedy.
        batch_size: Prompts that are answered at once, or sequences in a forward pass.
        max_new_tokens: Longest generated answer in tokens.
        scoring: As in :func:`scoring_of`.
        length_normalized: As in :func:`s2ft.text.likelihood.evaluate_likelihood`.
        answer_form: As in :func:`s2ft.text.likelihood.evaluate_likelihood`.

    Returns:
        The accuracy, and a record for each row.

    Raises:
        ValueError: The task can't be scored so, or no row fits into the model's context.
    """
    from s2ft.text.evaluation import evaluate
    from s2ft.text.likelihood import evaluate_likelihood

    kind, name = loaded.task.kind, loaded.task.name
    common = (model, prompter.tokenizer, loaded.examples, kind, batch_size)
    if scoring_of(loaded.task, scoring) == "generation":
        return evaluate(*common, max_new_tokens, name, prompter.format, num_beams)
    return evaluate_likelihood(*common, length_normalized, answer_form, prompter.format, name)


def score_suite(
    model,
    prompter,
    suite: Sequence[LoadedTask],
    *,
    done: Mapping[str, TaskResult] | None = None,
    on_result: Callable[[TaskResult], None] | None = None,
    **settings: Any,
) -> list[TaskResult]:
    """Score a model on all tasks of a suite.

    Args:
        model: A causal language model, with or without an adapter.
        prompter: As in :func:`evaluate_task`.
        suite: What :func:`load_suite` returned.
        done: Results of an earlier call by name. Their tasks are not scored again.
        on_result: Called with each new result as soon as it is there.
        settings: `num_beams`, `batch_size`, `max_new_tokens`, `scoring`, `length_normalized` and `answer_form` of
            :func:`evaluate_task`.

    Returns:
        One result for each task, in the order of the suite.

    Raises:
        ValueError: A task can't be scored in this way, or no row of it fits into the model's context.

    Example:
        >>> from pathlib import Path
        >>> from transformers import ByT5Tokenizer
        >>> from s2ft.text.adapter_prompts import Prompter
        >>> from s2ft.text.suites import find_suite, load_suite, score_suite
        >>> _ = Path("sums.jsonl").write_text('{"question": "2+3=", "answer": 5}')
        >>> suite = load_suite(find_suite(["sums.jsonl"], kind="arithmetic"))
        >>> prompter = Prompter(ByT5Tokenizer(chat_template="{{ messages[0]['content'] }}"))
        >>> (result,) = score_suite(model, prompter, suite, max_new_tokens=4)
        >>> result.name, result.of
        ('sums', 1)
    """
    results = []
    for loaded in suite:
        name = loaded.task.name
        if done and name in done:
            results.append(done[name])
            continue
        found = evaluate_task(model, prompter, loaded, **settings)
        counts = (found.accuracy, found.right, len(found.records), found.left_out, round(found.seconds, 2))
        results.append(TaskResult(name, *counts, tuple(asdict(record) for record in found.records)))
        if on_result:
            on_result(results[-1])
    return results
