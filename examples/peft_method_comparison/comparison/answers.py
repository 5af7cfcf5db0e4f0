"""Finds the answer in a text, and compares it with the right one, by the rules of PEFT's comparison."""

from decimal import Decimal

# In this order, because a text is searched for the first phrase that it has. "#### " is GSM8K's own mark.
PHRASES = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")


def answer_in(text: str) -> str | None:
    """Return what follows the last phrase that announces an answer, to the end of the line.

    Args:
        text: A worked answer.

    Returns:
        The answer without outer points, spaces, and signs of dollars and percent; None if no phrase is there.

    Example:
        >>> answer_in("2 + 2 makes $4.The answer is: $4.")
        '4'
        >>> answer_in("The answer is 4")
        '4'
        >>> answer_in("I think it is 4.") is None
        True
    """
    text = text.strip().rstrip(".!?")
    phrase = next((phrase for phrase in PHRASES if phrase in text), None)
    if phrase is None:
        return None
    return text.rpartition(phrase)[2].strip().split("\n")[0].strip(" .!?$%")


def number_of(text: str | None) -> float | None:
    """Return the number that a text is, decimal or a fraction.

    Args:
        text: A text, or None.

    Returns:
        The number, or None.

    Example:
        >>> number_of("65.33"), number_of("7/4"), number_of("1,200"), number_of("2 km")
        (65.33, 1.75, None, None)
    """
    above, line, below = (text or "").partition("/")
    try:
        value = Decimal(above.strip())
        return float(value / Decimal(below.strip()) if line else value)
    except (ArithmeticError, ValueError):
        return None


def is_right(text: str, right: str) -> bool:
    """Whether a generated text has the right answer, by the rules of PEFT's comparison.

    Numbers are compared as numbers, everything else as text. A number with a comma, such as 1,200, is text, and so
    differs from 1200.

    Args:
        text: The generated text.
        right: The worked answer of the set.

    Raises:
        ValueError: The worked answer has no answer.

    Example:
        >>> is_right("The answer is: 20/4", "5 apples\\n#### 5"), is_right("The answer is: 6", "#### 5")
        (True, False)
    """
    expected, found = answer_in(right), answer_in(text)
    if expected is None:
        raise ValueError(f"the set's answer has none of {', '.join(map(repr, PHRASES))}: {right[:80]!r}")
    if found is None:
        return False
    numbers = number_of(expected), number_of(found)
    return numbers[0] == numbers[1] if None not in numbers else numbers == (None, None) and expected == found
