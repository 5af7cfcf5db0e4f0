"""Reads MetaMathQA, GSM8K and texts of an encyclopedia from the hub, or from files."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 1300  # characters of question, space and answer; of MetaMathQA's rows 94 % are as short as this
VALIDATION, TEXTS = 50, 100
PROTECTED = 128  # further texts, which selections may protect; forgetting is not measured on them
# set: (its fields, its name on the hub, its config there)
SETS = {
    "metamathqa": (("query", "response"), "meta-math/MetaMathQA", None),
    "gsm8k-train": (("question", "answer"), "openai/gsm8k", "main"),
    "gsm8k-test": (("question", "answer"), "openai/gsm8k", "main"),
    "encyclopedia": (("text",), "HuggingFaceFW/finewiki", None),
}
# where the hub's own files lie in a folder; a file SET.jsonl goes first
HUB_FILES = {
    "metamathqa": "metamathqa/MetaMathQA*.json",
    "gsm8k-train": "gsm8k/main/train-*.parquet",
    "gsm8k-test": "gsm8k/main/test-*.parquet",
    "encyclopedia": "finewiki/**/*.parquet",
}


@dataclass(frozen=True)
class Data:
    """The texts of a run.

    Attributes:
        training: Questions and worked answers of MetaMathQA.
        validation: Questions and worked answers of GSM8K's training set.
        test: Questions and worked answers of GSM8K's test set.
        texts: Texts on which forgetting is measured.
        protected: Further texts of the encyclopedia, for selections with `protect_ratio`; empty if there are no more.
        source: Where each set was read from.
    """

    training: list[tuple[str, str]]
    validation: list[tuple[str, str]]
    test: list[tuple[str, str]]
    texts: list[str]
    protected: list[str]
    source: dict[str, str]


def read(folder: Path | None, rows: int, test_rows: int | None = None, least: int = 1) -> Data:
    """Read the sets as PEFT's comparison does.

    MetaMathQA's rows keep their order, without those of more than 1,300 characters. The validation set is 50 random
    problems of GSM8K's training set, always the same.

    Args:
        folder: Folder with the files; None reads from the hub.
        rows: Number of training rows to read, if there are so many.
        test_rows: Number of test problems, the first ones; None takes all.
        least: Number of training rows that are needed.

    Returns:
        The data.

    Raises:
        FileNotFoundError: The folder has no file of a set.
        ValueError: A row lacks a field, or there are fewer training rows than are needed.
    """
    short = (pair for pair in _pairs(folder, "metamathqa") if len(" ".join(pair)) <= LONGEST)
    training = list(islice(short, rows))
    if len(training) < least:
        raise ValueError(
            f"training takes {least:,} rows (max_steps × batch_size), and metamathqa has {len(training):,} of at most "
            f"{LONGEST:,} characters: lower max_steps"
        )
    candidates = list(_pairs(folder, "gsm8k-train"))
    order = np.random.RandomState(0).permutation(len(candidates))
    validation = [candidates[number] for number in order[:VALIDATION]]
    test = list(islice(_pairs(folder, "gsm8k-test"), test_rows))
    found_texts = [row["text"] for row in islice(_rows(folder, "encyclopedia"), TEXTS + PROTECTED)]
    texts, protected = found_texts[:TEXTS], found_texts[TEXTS:]
    for name, found in (("gsm8k-train", validation), ("gsm8k-test", test), ("encyclopedia", texts)):
        if not found:
            raise ValueError(f"{name} has no rows")
    return Data(training, validation, test, texts, protected, {name: _source(folder, name) for name in SETS})


def save(folder: Path, rows: int) -> list[Path]:
    """Save what runs of up to a number of training rows read from the hub, for a machine without a network.

    Args:
        folder: Folder for the files.
        rows: Number of training rows.

    Returns:
        The files.
    """
    data, files = read(None, rows), []
    folder.mkdir(parents=True, exist_ok=True)
    question, answer = SETS["gsm8k-train"][0]
    sets = {
        "metamathqa": [dict(zip(SETS["metamathqa"][0], pair)) for pair in data.training],
        "gsm8k-train": [{question: one, answer: two} for one, two in _pairs(None, "gsm8k-train")],
        "gsm8k-test": [{question: one, answer: two} for one, two in data.test],
        "encyclopedia": [{"text": text} for text in (*data.texts, *data.protected)],
    }
    for name, written in sets.items():
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return files


def _pairs(folder: Path | None, name: str) -> Iterator[tuple[str, str]]:
    question, answer = SETS[name][0]
    return ((row[question], row[answer]) for row in _rows(folder, name))


def _rows(folder: Path | None, name: str) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a set, and check their fields."""
    for number, row in enumerate(_stored(folder, name)):
        lacking = [key for key in SETS[name][0] if not isinstance(row.get(key), str)]
        if lacking:
            raise ValueError(
                f"{name}, row {number}: field {lacking[0]!r} must be text; the row has {', '.join(sorted(row))}"
            )
        yield row


def _stored(folder: Path | None, name: str) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    _, hub, config = SETS[name]
    if folder is None:
        split = "test" if name.endswith("test") else "train"
        return load_dataset(hub, config, split=split, streaming=name == "encyclopedia")
    file = _file(folder, name)
    kind = "parquet" if file.suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=str(file), split="train", streaming=True)


def _file(folder: Path, name: str) -> Path:
    found = [folder / f"{name}.jsonl"] if (folder / f"{name}.jsonl").is_file() else sorted(folder.glob(HUB_FILES[name]))
    if not found:
        raise FileNotFoundError(
            f"{folder} has neither {name}.jsonl nor {HUB_FILES[name]}: run.py --save-data DIR writes the files on a "
            "machine with a network"
        )
    return found[0]


def _source(folder: Path | None, name: str) -> str:
    if folder is None:
        return SETS[name][1]
    return _file(folder, name).name
