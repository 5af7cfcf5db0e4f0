"""Scoring: tables of texts and of the answers that are found in them."""

import pytest

from s2ft.text.data.forms import normalised
from s2ft.text.examples import Example, examples_of
from s2ft.text.scoring import first_word, is_right, last_number, right_answer

NUMBERS = {
    "The answer is 5.": 5,
    "5.0": 5,
    "1,234": 1234,
    "1,234,567.5 m": 1234567.5,
    "$5.": 5,
    "$1,234.50.": 1234.5,
    "-3": -3,
    "= -3.": -3,
    "-$7": -7,
    "$-7": -7,
    "(-4)": -4,
    "8-3": 3,
    "8 - 3": 3,
    "2 and 3, 4": 4,
    "10,20": 20,
    ".5": 0.5,
    "0.6.": 0.6,
    "12cm": 12,
    "50%": 50,
    "x2": 2,
    "7\n\n": 7,
    "\u22125": -5,
    "3 * 4 = 12. So 12!": 12,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text):
    assert last_number(text) == pytest.approx(NUMBERS[text])


@pytest.mark.parametrize("text", ["", "none", "five", "-", "$"])
def test_no_number(text):
    assert last_number(text) is None and not is_right(text, "5", "arithmetic")


def test_letter_is_a_right_answer_of_arithmetic():
    assert right_answer(Example("Which? (A) 5 (B) 6", "so B", "B"), "arithmetic") == "B"


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("it is 6", "6.0", True),
        ("6.0005", "6", True),
        ("6.002", "6", False),
        ("6, no, 7", "6", False),
        ("-6", "6", False),
        ("1,000", "1000", True),
        ("A rope of 5 m: the answer is C.", "C", True),
        ("The answer is C, not D", "C", False),
        ("CD 5", "C", False),
    ],
)
def test_arithmetic(text, answer, right):
    assert is_right(text, answer, "arithmetic") is right


@pytest.mark.parametrize(
    "text, answer, right",
    [
        ("the correct answer is true", "true", True),
        ("True.", "true", True),
        ("untrue", "true", False),
        ("false or true", "true", False),
        ("answer2", "answer2", True),
        ("Answer1: x Answer2: y", "answer2", False),
        ("the answer is true: answer3", "answer3", True),
        ("solution1", "solution1", True),
        ("ending4", "ending4", True),
        ("option2", "option1", False),
        ("", "true", False),
        ("answer22", "answer2", False),
    ],
)
def test_commonsense(text, answer, right):
    assert is_right(text, answer, "commonsense") is right


def example(output, answer=None):
    return Example(({"role": "user", "content": "q"},), output, answer)


def test_the_right_answer_is_the_field_or_is_found_in_the_output():
    assert right_answer(example("3 + 4 = 7. The answer is 7.", "8.0"), "arithmetic") == "8.0"
    assert float(right_answer(example("3 + 4 = 7. The answer is 7."), "arithmetic")) == 7
    assert right_answer(example("the correct answer is answer2"), "commonsense") == "answer2"
    assert right_answer(example("x", " True"), "commonsense") == "true"


@pytest.mark.parametrize(
    "row, task, message",
    [
        (example("no"), "arithmetic", "has no number"),
        (example("5", "F"), "arithmetic", "'F' has no number"),
        (example("no"), "commonsense", "has no answer word"),
        (example("true", "yes"), "commonsense", "'yes' is not"),
        (example("5"), "algebra", "task must be one of arithmetic, commonsense, got 'algebra'"),
    ],
)
def test_a_row_that_can_not_be_scored_is_an_error(row, task, message):
    with pytest.raises(ValueError, match=message):
        right_answer(row, task)


def test_first_word_of_another_family_is_an_error():
    with pytest.raises(ValueError, match="not an answer word"):
        first_word("true", "maybe")


def row(**fields):
    (found,) = examples_of([normalised({"instruction": "Which?", "output": "", **fields}, {}, scored=True)])
    return found


AQUA = "What is 60% of 30% of 1400 grams? Answer Choices: (A) 450 gms (B) 100 gms (C) 252 gms (D) 240 (E) None of these"


@pytest.mark.parametrize("answer", ["C", ["C"]])
def test_letters_of_aqua(answer):
    """As in LLM-Adapters: the answer is a letter or a list with it, and the output ends with a letter of its own."""
    found = row(instruction=AQUA, output="A rope: 252 gms. The answer is (D).", answer=answer)
    assert right_answer(found, "arithmetic") == "C" and is_right("so 252. The answer is (C).", "C", "arithmetic")
    assert not is_right(found.output, "C", "arithmetic")
