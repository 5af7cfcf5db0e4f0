"""Scoring: tables of texts and of the answers that are found in them."""

import pytest
from support.inside import (
    Example,
    PromptFormat,
    examples_of,
    first_word,
    is_right,
    last_number,
    normalised,
    read_examples,
    right_answer,
)
from train.tiny import write_jsonl

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
def test_right_answers_of_both_tasks(text, answer, right):
    assert is_right(text, answer, "arithmetic" if answer[:1].isdigit() or answer == "C" else "commonsense") is right


def example(output, answer=None):
    return Example(({"role": "user", "content": "q"},), output, answer)


def test_the_right_answer_is_the_field_or_is_found_in_the_output():
    assert right_answer(example("3 + 4 = 7. The answer is 7.", "8.0"), "arithmetic") == "8.0"
    assert float(right_answer(example("3 + 4 = 7. The answer is 7."), "arithmetic")) == 7
    for text in ("0.00005", "20000000000000000"):
        assert is_right(text, right_answer(example(text), "arithmetic"), "arithmetic")
    assert right_answer(example("so B", "B"), "arithmetic") == "B"
    assert right_answer(example("the correct answer is answer2"), "commonsense") == "answer2"
    assert right_answer(example("x", " True"), "commonsense") == "true"


# ---- rows that can't be scored ---------------------------------------------------------------------------


def row(**fields):
    (found,) = examples_of(
        [normalised({"instruction": "Which?", "output": "", "answer": None, **fields}, {}, scored=True)]
    )
    return found


AQUA = "What is 60% of 30% of 1400 grams? Answer Choices: (A) 450 gms (B) 100 gms (C) 252 gms (D) 240 (E) None of these"


@pytest.mark.parametrize("answer", ["C", ["C"]])
def test_letters_of_aqua(answer):
    """As in LLM-Adapters: the answer is a letter or a list with it, and the output ends with a letter of its own."""
    found = row(instruction=AQUA, output="A rope: 252 gms. The answer is (D).", answer=answer)
    assert right_answer(found, "arithmetic") == "C" and is_right("so 252. The answer is (C).", "C", "arithmetic")
    assert not is_right(found.output, "C", "arithmetic")


@pytest.mark.parametrize(
    "fields, task, message",
    [
        ({"output": "no"}, "arithmetic", "no number"),
        ({"output": "5", "answer": "F"}, "arithmetic", "'F' has no number"),
        ({"output": "no"}, "commonsense", "no answer word"),
        ({"output": "true", "answer": "yes"}, "commonsense", "'yes' has no answer word"),
        ({"output": "5"}, "algebra", "task .*arithmetic"),
    ],
)
def test_a_row_that_can_not_be_scored_is_an_error(fields, task, message):
    with pytest.raises(ValueError, match=message):
        right_answer(row(**fields), task)
    with pytest.raises(ValueError, match="answer word"):
        first_word("true", "maybe")


# ---- examples of files ---------------------------------------------------------------------------------


def test_examples_are_read_like_training_data(tmp_path):
    chat = [
        {"role": role, "content": text}
        for role, text in zip(("system", "user", "assistant", "user", "assistant"), "b1234")
    ]
    rows = [{"messages": chat}, {"prompt": chat[:2], "completion": chat[2:]}, {"prompt": "2+3=", "completion": "5"}]
    files = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows)
    first, second, text, again = read_examples(*map(str, files))[:4]
    for found in (first, second, again):
        assert (found.question, found.output, found.answer) == ("3", "4", None)
        assert [message["content"] for message in found.conversation] == ["b", "1", "2", "3"]
    assert text.question == "2+3=" == text.prompt_for(PromptFormat("text")) and text.output == "5"
    messages = text.prompt_for(PromptFormat(system="Be brief."))
    assert [message["content"] for message in messages] == ["Be brief.", "2+3="]
    with pytest.raises(ValueError, match="c.jsonl, line 1: .*'text'"):
        read_examples(str(write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}])))
