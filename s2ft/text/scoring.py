"""Score generated text as LLM-Adapters does: by its last number, or by its first answer word.

A right answer that is a letter from A to E is compared with the last such letter that stands alone in the text.
"""

import re
from typing import Any

TASKS = ("arithmetic", "commonsense", "exact")  # tasks whose generated answers can be scored
TOLERANCE = 1e-3
LETTERS = re.compile(r"\b([A-E])\b")  # choices, as in AQuA
# A minus is a sign only if it cannot be a subtraction: "8-3" ends in 3, "= -3" ends in -3.
NUMBER = re.compile(r"((?<![\w.)\]])-\$?|\$-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# Families of answer words. The right answer determines which family is searched for.
FAMILIES = (r"true|false", r"answer\d", r"solution\d", r"ending\d", r"option\d")


def last_number(text: str) -> float | None:
    """Return the last number in the text, or None if there is none.

    Example:
        >>> s2ft.text.scoring.last_number("3 times $400 is $1,200.")
        1200.0
    """
    found = NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return None
    sign, digits = found[-1]
    return float(digits.replace(",", "")) * (-1 if "-" in sign else 1)


def first_word(text: str, answer: str) -> str | None:
    """Return the first answer word in the text that belongs to the same family as `answer`, or None.

    Raises:
        ValueError: `answer` is not an answer word.

    Example:
        >>> s2ft.text.scoring.first_word("I think option2 is better than option1.", answer="option1")
        'option2'
    """
    family = next((words for words in FAMILIES if re.fullmatch(words, answer)), None)
    if family is None:
        raise ValueError(f"{answer!r} is not an answer word (true, false, answer1, solution1, ending1, option1 …)")
    found = re.search(rf"\b(?:{family})\b", text.lower())
    return found.group() if found else None


def right_answer(example: Any, task: str) -> str:
    """Return the answer that an example is scored against.

    Args:
        example: The :class:`~s2ft.text.evaluation.Example`. Its `answer` is used, or the answer in its `output`.
        task: One of TASKS.

    Raises:
        ValueError: The task is unknown, or the example has no answer that the task can score.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task == "exact":
        return example.output if example.answer is None else example.answer
    if task == "arithmetic":
        source = example.output if example.answer is None else example.answer
        if example.answer is not None and LETTERS.fullmatch(source.strip()):
            return source.strip()
        number = last_number(source)
        if number is None:
            raise ValueError(f"{source!r} has no number, which task arithmetic needs")
        return repr(number) if example.answer is None else example.answer
    if example.answer is not None:
        first_word("", answer := example.answer.strip().lower())
        return answer
    found = re.search(rf"\b(?:{'|'.join(FAMILIES)})\b", example.output.lower())
    if found is None:
        raise ValueError(f"{example.output!r} has no answer word, which task commonsense needs")
    return found.group()


def is_right(text: str, answer: str, task: str) -> bool:
    """Whether generated text contains the right answer.

    Args:
        text: The generated text.
        answer: The right answer, as :func:`right_answer` returns it.
        task: One of TASKS. For "exact", case, white space and a full stop at the end make no difference.
    """
    if task == "exact":
        return _plain(text) == _plain(answer)
    if task == "commonsense":
        return first_word(text, answer) == answer
    if LETTERS.fullmatch(answer):
        return LETTERS.findall(text)[-1:] == [answer]
    number, expected = last_number(text), last_number(answer)
    return number is not None and expected is not None and abs(number - expected) <= TOLERANCE


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")
