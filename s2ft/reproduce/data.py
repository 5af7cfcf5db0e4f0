"""The data of a trial: files in the public folders, and rows as tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2ft.text.data import DataOptions, load_rows, load_split
from s2ft.text.encoding import context_length, tokenize_rows
from s2ft.text.examples import Example, examples_of
from s2ft.text.prompts import PromptFormat


def find_file(name: str, folder: str | None, option: str) -> str:
    """Return the path of a data file.

    Args:
        name: A path in the folder, or a path.
        folder: The folder of the data files, or None.
        option: The option that names the file, for the message.

    Raises:
        FileNotFoundError: There is no such file.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.reproduce.data import find_file
        >>> Path("data").mkdir()
        >>> _ = Path("data/mine.json").write_text("[]")
        >>> Path(find_file("mine.json", "data", "train")).as_posix()
        'data/mine.json'
    """
    places = [Path(folder).expanduser() / name] if folder is not None else []
    places.append(Path(name).expanduser())
    for place in places:
        if place.is_file():
            return str(place)
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"data {folder} is no folder")
    hint = "" if folder is not None else "; --data names the folder of the data files"
    raise FileNotFoundError(f"{option}: there is no file {' or '.join(map(str, places))}{hint}")


@dataclass(frozen=True)
class TrialData:
    """Token rows of a trial.

    Attributes:
        train: The training rows, a Dataset with the columns input_ids and labels, in the order of the seed.
        held_out: The held-out rows, or None.
        summary: What is in the training rows, as text.
        questions: The questions of the training rows, without outer white space.
    """

    train: Any
    held_out: Any
    summary: str
    questions: frozenset[str] = frozenset()

    def known(self, examples: Iterable[Example]) -> int:
        """Return how many examples have a question that is also trained on.

        Args:
            examples: Examples that are scored.
        """
        return sum(example.question.strip() in self.questions for example in examples)


def trial_data(
    files: Sequence[str],
    model: Any,
    tokenizer: Any,
    prompt: PromptFormat,
    *,
    seed: int,
    max_length: int,
    held_out: int = 0,
    limit: int | None = None,
) -> TrialData:
    """Read rows, hold some of them out, and convert them to tokens.

    Args:
        files: Files with rows in any form that `s2ft sft` reads.
        model: The model, for the length of its context.
        tokenizer: Its tokenizer, with the template of the prompt.
        prompt: The format of prompts.
        seed: Seed of the held-out rows and of the order of the others.
        max_length: Longest row in tokens. Longer ones are left out and counted.
        held_out: Number of rows to hold out.
        limit: Use the first rows only.

    Returns:
        The rows.

    Raises:
        ValueError: A row can't be used, or there are too few rows.
    """
    options = DataOptions(data=list(files), test_split_size=held_out or None, limit=limit)
    train, other = load_split(options, seed=seed, evaluates=bool(held_out))
    length = min(max_length, context_length(model) or max_length)
    rows = tokenize_rows(train.shuffle(seed=seed), tokenizer, prompt, max_length=length)
    tokens = None if other is None else tokenize_rows(other, tokenizer, prompt, max_length=length).dataset
    asked = examples_of(row for row in train if row.get("text") is None)
    questions = frozenset(example.question.strip() for example in asked)
    return TrialData(rows.dataset, tokens, str(rows), questions)


def text_rows(file: str, model: Any, tokenizer: Any, prompt: PromptFormat, max_length: int, limit: int) -> Any:
    """Return the token rows of other text, with a label on every token of an answer or of a plain text.

    Args:
        file: A file with rows in any form that `s2ft sft` reads, such as {"text": ...}.
        model: The model, for the length of its context.
        tokenizer: Its tokenizer.
        prompt: The format of prompts of rows that are no plain texts.
        max_length: Longest row in tokens. A longer text is cut into several rows.
        limit: Use the first rows of the file only.
    """
    rows = load_rows(DataOptions(data=[file], limit=limit))
    return tokenize_rows(
        rows, tokenizer, prompt, max_length=min(max_length, context_length(model) or max_length)
    ).dataset
