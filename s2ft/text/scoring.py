"""Score generated text as LLM-Adapters does: the last number, or the first answer word."""

import re

from s2ft.text.examples import Example

TASKS = ("arithmetic", "commonsense")
TOLERANCE = 1e-3
# A sign counts only where it can't be a minus between two numbers: "8-3" ends in 3, "= -3" in -3.
NUMBER = re.compile(r"((?<![\w.)\]])-\$?|\$-?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
# Families of answer words; which one is meant is told by the right answer.
FAMILIES = (r"true|false", r"answer\d", r"solution\d", r"ending\d", r"option\d")


def last_number(text: str) -> float | None:
    """The last number in the text: 1,234 and $5. and -3 and 5.0 are numbers."""
    found = NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return None
    sign, digits = found[-1]
    return float(digits.replace(",", "")) * (-1 if "-" in sign else 1)


def first_word(text: str, answer: str) -> str | None:
    """The first answer word in the text, of the family that `answer` belongs to; None if there is none."""
    family = next((words for words in FAMILIES if re.fullmatch(words, answer)), None)
    if family is None:
        raise ValueError(f"{answer!r} is not an answer word (true, false, answer1, solution1, ending1, option1 …)")
    found = re.search(rf"\b(?:{family})\b", text.lower())
    return found.group() if found else None


def right_answer(example: Example, task: str) -> str:
    """What the example is scored against: its `answer`, or else what stands in its output.

    Raises: ValueError where that is nothing the task can score.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if task == "arithmetic":
        source = example.output if example.answer is None else example.answer
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
    """Whether generated text gives the answer."""
    if task == "commonsense":
        return first_word(text, answer) == answer
    number = last_number(text)
    return number is not None and abs(number - last_number(answer)) <= TOLERANCE
