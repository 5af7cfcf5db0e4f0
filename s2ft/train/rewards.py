"""Rewards for s2ft grpo: two that are built in, and functions of a file or of a package.

TRL's accuracy_reward was tried in place of `answer_equal`: it takes LaTeX such as \\boxed{42} only, and gives 0 or no
reward to right answers in words, in `<answer>`, after `####`, and to letters of choices (32 of 46 cases of the tests).
"""

import asyncio
import functools
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from s2ft.config import did_you_mean, refuse
from s2ft.text.data.forms import GIVEN

Reward = Callable[..., Any]

# ---- what a completion answers -------------------------------------------------------------------------

UNIT = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus is a sign only if it cannot be a subtraction: "8-3" ends in 3, "= -3" ends in -3.
SIGN = r"(?:(?<![\w.)\]}])-\$?|\$-?)?"
NUMBER = re.compile(
    rf"(?P<sign>{SIGN})(?:\\[dt]?frac\{{\s*(?P<minus>-?)\s*(?P<top>{UNIT})\s*\}}\{{\s*(?P<bottom>{UNIT})\s*\}}"
    rf"|(?P<whole>{UNIT})(?:\s?/\s?(?P<below>{UNIT}))?(?:[eE](?P<power>[+-]?\d{{1,3}})\b)?)"
)
DIGITS = 60  # a longer number is no answer
TOLERANCE = Fraction(1, 1000)  # as in s2ft eval
PHRASE = re.compile(r"answer\s*(?:is\b|:|=)[\s:]*(\S[^\n]*?)(?=\.\s|\n|$)", re.IGNORECASE)
LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
CHOICES = (r"\(([A-Z])\)", r"^\s*\**([A-Z])\**[.):]?\s*$", r"\b([A-Z])(?=[).:*]|\s*$)", r"\b([B-HJ-Z])\b")
OUTER = " \t\r\n.,;:!?\"'*`$"


def text_of(completion: str | Sequence[dict]) -> str:
    """Return the text of a completion, which TRL gives as text or as a list of messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message.get("content") or "") for message in completion)


def after_thinking(text: str) -> str | None:
    """Return the text after the last `</think>`, or None if a `<think>` is not closed."""
    rest = text.rpartition("</think>")[2]
    return None if "<think>" in rest else rest


def marked_answers(text: str) -> list[str]:
    r"""Return the answers that a text marks, in their order.

    Args:
        text: A text with answers in `<answer>...</answer>`, in `\boxed{...}`, or after `####` on a line.

    Returns:
        The marked texts without outer white space.

    Example:
        >>> from s2ft.train.rewards import marked_answers
        >>> marked_answers(r"so x is \boxed{\frac{1}{2}}" + "\n#### 42")
        ['\\frac{1}{2}', '42']
    """
    found = [(match.start(), match[1]) for match in re.finditer(r"<answer>(.*?)</answer>", text, re.DOTALL)]
    found += [(match.start(), match[1]) for match in re.finditer(r"####[ \t]*([^\n]*)", text)]
    found += [(match.start(), inside) for match in re.finditer(r"\\boxed\{", text) if (inside := _braces(text, match))]
    return [inside.strip() for _, inside in sorted(found)]


def _braces(text: str, opening: re.Match) -> str | None:
    """Return the text up to the brace that closes, or None if none does."""
    depth = 1
    for place in range(opening.end(), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[opening.end() : place]
    return None


def numbers(text: str) -> list[Fraction]:
    r"""Return the numbers of a text: with commas, negative, decimal, as a fraction or with an exponent.

    Args:
        text: Any text.

    Returns:
        The numbers. A percent sign or a unit after a number is ignored.

    Example:
        >>> from s2ft.train.rewards import numbers
        >>> [str(one) for one in numbers(r"1,200 - 3/4 = \frac{4797}{4}, about -1.2e3")]
        ['1200', '3/4', '4797/4', '-1200']
    """
    text = text.replace("\u2212", "-").replace("\\!", "").replace("\\,", "").replace("\\$", "$")
    values = (_value(match) for match in NUMBER.finditer(text) if len(match[0]) <= DIGITS)
    return [value for value in values if value is not None]


def _value(match: re.Match) -> Fraction | None:
    top, bottom = match["top"] or match["whole"], match["bottom"] or match["below"] or "1"
    top, bottom = (Fraction(part.replace(",", "")) for part in (top, bottom))
    if bottom == 0:
        return None
    value = top / bottom * Fraction(10) ** int(match["power"] or 0)
    return -value if ("-" in match["sign"]) != bool(match["minus"]) else value


def is_equal(text: str, answer: str) -> bool:
    r"""Whether a text gives an answer.

    The last answer that :func:`marked_answers` finds counts. Without one it is what follows "answer is" or "answer:",
    else the last number, letter or line, whichever the expected answer is.

    Args:
        text: A completion. A part in `<think>...</think>` is left out.
        answer: The expected answer: a number, the letter of a choice, or any other text. A marked answer in it counts
            alone, such as 42 in "6 * 7 = 42 #### 42".

    Returns:
        True for the same number up to a thousandth, the same letter, or the same text without case, outer punctuation
        and repeated blanks.

    Example:
        >>> from s2ft.train.rewards import is_equal
        >>> is_equal("3 times 400 is $1,200.", "1200"), is_equal(r"\boxed{-\frac{1}{2}}", "-0.5")
        (True, True)
        >>> is_equal("I think that (B) is right", "b"), is_equal("The answer is Paris.", "paris")
        (True, True)
    """
    rest = after_thinking(text)
    if rest is None:
        return False
    expected = (marked_answers(answer) or [answer])[-1].strip().replace("\u2212", "-")
    marked, phrase = marked_answers(rest), PHRASE.findall(rest)
    said = (marked or phrase or [rest])[-1]
    number = NUMBER.fullmatch(expected.strip(OUTER.replace("$", "").replace(".", "") + "%").removesuffix("."))
    if number:
        found, right = numbers(said), numbers(expected)
        return bool(found and right) and abs(found[-1] - right[-1]) <= TOLERANCE * min(1, abs(right[-1]))
    letter = LETTER.fullmatch(expected)
    if letter:
        return _choice(said) == letter[1].upper()
    lines = [line for line in said.splitlines() if line.strip()] or [""]
    return _plain(said if marked or phrase else lines[-1]) == _plain(expected)


def _choice(said: str) -> str | None:
    """Return the letter of the choice that a text names last, in the surest of several ways."""
    if LETTER.fullmatch(said.strip(OUTER)):
        said = said.upper()
    for pattern in CHOICES:
        found = re.findall(pattern, said, re.MULTILINE)
        if found:
            return found[-1]
    return None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(OUTER)


# ---- built-in rewards ----------------------------------------------------------------------------------


def answer_equal(completions: Sequence, answer: Sequence, **_: Any) -> list[float | None]:
    """Reward 1 for a completion with the right answer, and 0 for any other one; see :func:`is_equal`.

    Args:
        completions: Texts, or lists of messages.
        answer: The expected answer of each completion: the column `answer` of the data. None is not scored.
        _: The other arguments of TRL.

    Returns:
        One reward for each completion.

    Example:
        >>> from s2ft.train.rewards import answer_equal
        >>> answer_equal(["It is 4.", "It is 5."], answer=["4", "4"])
        [1.0, 0.0]
    """
    return [
        None if right is None else float(is_equal(text_of(completion), str(right)))
        for completion, right in zip(completions, answer)
    ]


def answer_format(completions: Sequence, **_: Any) -> list[float]:
    r"""Reward 1 for a completion that marks one answer, and 0 for any other one.

    The mark is `<answer>...</answer>`, `\boxed{...}`, or `#### ...` at the start of a line. The answer must not be
    empty, there must be one, and a `<think>` must be closed before it.

    Args:
        completions: Texts, or lists of messages.
        _: The other arguments of TRL.

    Returns:
        One reward for each completion.

    Example:
        >>> from s2ft.train.rewards import answer_format
        >>> answer_format(["<think>2 + 2</think> <answer>4</answer>", "4", "#### 4\n#### 5"])
        [1.0, 0.0, 0.0]
    """
    rests = [after_thinking(text_of(completion)) for completion in completions]
    marked = [[] if rest is None else marked_answers(rest) for rest in rests]
    return [float(len(answers) == 1 and answers[0] != "") for answers in marked]


BUILT_IN: dict[str, Reward] = {"answer_equal": answer_equal, "format": answer_format}

# ---- rewards of a file ---------------------------------------------------------------------------------


class RewardError(ValueError):
    """A reward has failed, or has returned something that is no list of rewards. The message names it."""


def load_rewards(names: Iterable[str]) -> list[Reward]:
    """Return the rewards of these names.

    Args:
        names: Names of built-in rewards; `FILE.py:NAME` or `FILE.py:NAME,NAME` for functions of a file, or `FILE.py`
            for every function of the file that has a parameter `completions`; `MODULE.NAME` for a function of a
            package, such as trl.rewards.accuracy_reward. A function has the signature of TRL: it takes `completions`
            and columns of the data as keyword arguments, and returns a list of numbers, with None for a completion
            that it does not score.

    Returns:
        The functions, in their order. They raise :class:`RewardError` for a wrong result.

    Raises:
        ValueError: A reward is unknown, or the file can't be run. The message names the nearest one.
        FileNotFoundError: The file does not exist.

    Example:
        >>> from pathlib import Path
        >>> from s2ft.train.rewards import load_rewards
        >>> _ = Path("mine.py").write_text("def short(completions, **_): return [-len(c) for c in completions]")
        >>> [reward.__name__ for reward in load_rewards(["answer_equal", "mine.py:short"])]
        ['answer_equal', 'short']
    """
    found: list[Reward] = []
    for name in names:
        file = re.fullmatch(r"(.+\.py)(?::(.*))?", name)
        module, _, function = name.rpartition(".")
        if name in BUILT_IN:
            found.append(checked(BUILT_IN[name], name))
        elif file:
            path, wanted = Path(file[1]), file[2] or ""
            found += [checked(one, f"{path}:{getattr(one, '__name__', wanted)}") for one in _of_file(path, wanted)]
        elif module and _has_module(module):
            found.append(checked(_named(module, importlib.import_module(module), function), name))
        else:
            raise ValueError(
                f"rewards: there is no built-in reward {name!r}{did_you_mean(name, BUILT_IN)}; the built-in ones are "
                f"{', '.join(BUILT_IN)}, and others are given as FILE.py, FILE.py:NAME or MODULE.NAME"
            )
    if not found:
        raise ValueError(f"rewards: give at least one: {', '.join(BUILT_IN)}, FILE.py:NAME or MODULE.NAME")
    return found


def _has_module(name: str) -> bool:
    """Whether there is a module of this name. The packages around it are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def _of_file(path: Path, wanted: str) -> list[Reward]:
    if not path.is_file():
        raise FileNotFoundError(f"rewards: file {path} doesn't exist")
    name = f"s2ft_rewards_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"rewards: {path} can't be run: {type(error).__name__}: {error}") from error
    if wanted:
        return [_named(path, module, one.strip()) for one in wanted.split(",")]
    mine = (one for one in vars(module).values() if inspect.isfunction(one) and one.__module__ == name)
    rewards = [one for one in mine if one.__name__[0] != "_" and "completions" in _parameters(one)]
    if not rewards:
        raise ValueError(f"rewards: {path} has no function with a parameter completions")
    return rewards


def _named(where: object, module: Any, name: str) -> Reward:
    function = getattr(module, name, None)
    refuse(
        (function is None, f"rewards: {where} has no function {name!r}{did_you_mean(name, dir(module))}"),
        (not callable(function), f"rewards: {name} in {where} is no function but {type(function).__name__}"),
    )
    if "completions" not in _parameters(function) and not _takes_all(function):
        raise ValueError(f"rewards: {where}:{name} needs a parameter completions, and **_ for what it does not use")
    return function


def check_columns(rewards: Sequence[Reward], columns: Iterable[str]) -> None:
    """Check that the data has the columns that rewards need, and that each reward takes what TRL gives it.

    Args:
        rewards: Functions of :func:`load_rewards`.
        columns: Names of the data's columns.

    Raises:
        ValueError: A column is missing, or a function does not take all columns. The message names the function.
    """
    columns = list(columns)
    for reward in rewards:
        needed = [
            name
            for name, one in _parameters(reward).items()
            if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ]
        missing = [name for name in needed if name not in columns and name not in GIVEN]
        if missing:
            raise ValueError(
                f"reward {reward.title} needs a column {missing[0]!r} of the data, which has {', '.join(columns)}"
                f"{did_you_mean(missing[0], columns)}"
            )
        if not _takes_all(reward):
            raise ValueError(f"reward {reward.title} must end its parameters with **_: TRL gives it all columns")


_loop = functools.cache(asyncio.new_event_loop)  # one, since clients of judges belong to the loop of their first use


def checked(function: Reward, title: str) -> Reward:
    """Return a function that calls a reward and checks its result. Errors name `title`."""

    @functools.wraps(function)
    def reward(*args: Any, **given: Any) -> list:
        try:
            result = function(*args, **given)
            if inspect.isawaitable(result):
                result = _loop().run_until_complete(result)
        except Exception as error:
            line = inspect.trace()[-1].lineno
            raise RewardError(f"reward {title} raised {type(error).__name__} in line {line}: {error}") from error
        return _check_result(result, len(given["completions"]), title)

    reward.title, reward.__name__ = title, getattr(function, "__name__", title)  # a partial has no name of its own
    return reward


def _check_result(result: Any, count: int, title: str) -> list:
    try:
        rewards = [None if one is None else float(one) for one in result]
    except (TypeError, ValueError):
        raise RewardError(f"reward {title} must return a list of numbers, got {type(result).__name__}") from None
    if len(rewards) != count:
        raise RewardError(f"reward {title} returned {len(rewards)} rewards for {count} completions")
    wrong = [one for one in rewards if one is not None and not math.isfinite(one)]
    if wrong:
        raise RewardError(f"reward {title} returned {wrong[0]}: return a finite number, or None for no reward")
    return rewards


def _parameters(function: Reward) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _takes_all(function: Reward) -> bool:
    return any(one.kind is one.VAR_KEYWORD for one in _parameters(function).values())
