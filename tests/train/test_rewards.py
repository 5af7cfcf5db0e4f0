"""Rewards: what the built-in ones read in a text, and how functions of a file are found and checked."""

import asyncio

import pytest

from s2ft.train.rewards import answer_equal, answer_format, check_columns, is_equal, load_rewards, numbers

# (completion, expected answer): equal
EQUAL = [
    ("The total is $1,200.", "1200"),
    ("1,234,567", "1234567"),
    ("so 6 * 7 = 42\n#### 42", "6 * 7 = 42\n#### 42"),
    ("#### 42", "42"),
    ("We get \\boxed{42}, not 43.", "42"),
    ("\\boxed{1} no: \\boxed{2}", "2"),
    (r"\boxed{\frac{3}{4}}", "0.75"),
    (r"it is \dfrac{-1}{2}", "-1/2"),
    (r"-\frac{1}{2}", "-0.5"),
    ("3/4", r"\frac{3}{4}"),
    ("The answer is -7. I checked 100 cases.", "-7"),
    ("The answer is: 5", "5"),
    ("x = -$3", "-3"),
    ("5 \u2212 8 = \u22123", "-3"),
    ("8-3", "3"),
    ("about 3.14159", "3.1416"),
    ("1.5e3 metres", "1500"),
    ("it is 50%", "50%"),
    ("<think>maybe 3</think> 4", "4"),
    ("<answer> 12 apples </answer> and 13 more", "12"),
    ("5.", "5"),
    (".5", "0.5"),
    ("(B)", "B"),
    ("The answer is B.", "b"),
    ("I am sure that A is wrong, so (C) it is", "C"),
    ("<answer>d</answer>", "D"),
    ("A cat sat. B. is right", "B"),
    ("**C**", "C"),
    ("It must be\nParis.", "paris"),
    ("The answer is New   York!", "new york"),
    (r"\boxed{x + 1}", "x + 1"),
]
UNEQUAL = [
    ("", "5"),
    ("no idea", "5"),
    ("The answer is 42, or maybe 43", "42"),
    ("<think>it is 5", "5"),
    (r"\boxed{5", "7"),
    ("1/0", "0"),
    ("-5", "5"),
    ("1,20", "120"),
    ("1001", "1000"),
    ("0.0004", "0"),
    ("A cat", "A"),
    ("I", "I am"),
    ("Paris is nice", "Paris"),
    ("9" * 10_000, "9"),
    ("1e999", "0"),
]


@pytest.mark.parametrize(("text", "answer"), EQUAL)
def test_a_right_answer_is_found(text, answer):
    assert is_equal(text, answer)


@pytest.mark.parametrize(("text", "answer"), UNEQUAL)
def test_a_wrong_answer_is_none(text, answer):
    assert not is_equal(text, answer)


def test_numbers_are_read_exactly():
    assert [str(one) for one in numbers("1,200.50 -3 2-1 1/3 2e-2 1,2 $-4")] == (
        ["2401/2", "-3", "2", "1", "1/3", "1/50", "1", "2", "-4"]
    )


def test_messages_are_scored_as_their_text():
    completions = [[{"role": "assistant", "content": "It is 4."}], [{"role": "assistant", "content": None}]]
    assert answer_equal(completions, ["4", "4"]) == [1.0, 0.0]
    assert answer_equal(["4", "4"], [4, None]) == [1.0, None]  # None is not scored


def test_the_format_is_one_marked_answer():
    texts = ["<answer>4</answer>", r"\boxed{4}", "so\n#### 4", "<think>#### 1</think>#### 2"]
    assert answer_format(texts) == [1.0] * 4
    texts = ["4", "<answer></answer>", "#### 4\n#### 4", r"\boxed{4", "<think><answer>4</answer>", "####"]
    assert answer_format(texts) == [0.0] * 6


# ---- rewards of a file ---------------------------------------------------------------------------------

FILE = """
from math import sqrt

def short(completions, **_):
    return [-float(len(text)) for text in completions]

def right(completions, answer, **_):
    return [float(text == one) for text, one in zip(completions, answer)]

def helper(text):
    return text

def fails(completions, **_):
    return [1 / 0]

async def later(completions, **_):
    return [1.0 for _ in completions]

def strict(completions):
    return []

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_functions_of_a_file_are_rewards(file):
    short, right, again = load_rewards([f"{file}:short,right", "answer_equal"])
    assert short(completions=["abc"], prompts=[""]) == [-3.0]
    assert right(completions=["a", "b"], answer=["a", "a"]) == [1.0, 0.0]
    assert (short.__name__, again.__name__) == ("short", "answer_equal")  # TRL logs these names


def test_a_file_without_names_gives_every_function_with_completions(file):
    assert [reward.__name__ for reward in load_rewards([str(file)])] == ["short", "right", "fails", "later", "strict"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["answer_equals"], "no built-in reward 'answer_equals'; did you mean answer_equal?"),
        (["mine.py:rihgt"], "has no function 'rihgt'; did you mean right?"),
        (["mine.py:number"], "number in mine.py is no function but int"),
        (["mine.py:helper"], "mine.py:helper needs a parameter completions"),
        (["broken.py"], "broken.py can't be run: ModuleNotFoundError: No module named 'nosuch_package'"),
        (["empty.py"], "empty.py has no function with a parameter completions"),
        (["missing.py"], "file missing.py doesn't exist"),
        ([], "give at least one"),
    ],
)
def test_a_wrong_name_is_explained(names, words, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "broken.py").write_text("import nosuch_package")
    (file.parent / "empty.py").write_text("x = 1")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_rewards(names)
    assert words in str(error.value)


def test_columns_are_checked_before_the_training(file):
    check_columns(load_rewards([f"{file}:right", "format"]), ["prompt", "answer"])
    with pytest.raises(ValueError, match="reward answer_equal needs a column 'answer' of the data, which has prompt, "):
        check_columns(load_rewards(["answer_equal"]), ["prompt", "answers"])
    with pytest.raises(ValueError, match=r"strict must end its parameters with \*\*_"):
        check_columns(load_rewards([f"{file}:strict"]), ["prompt"])


def test_a_reward_that_fails_is_named(file, tmp_path):
    (fails,) = load_rewards([f"{file}:fails"])
    with pytest.raises(ValueError, match=r"mine.py:fails raised ZeroDivisionError in line 14"):
        fails(completions=["a"])
    results = tmp_path / "results.py"
    for text, words in (("[1, 2]", "2 rewards for 1 completions"), ("1", "list of numbers, got int"),
                        ("[float('nan')]", "returned nan"), ("['a']", "list of numbers")):  # fmt: skip
        results.write_text(f"def wrong(completions, **_): return {text}")
        (wrong,) = load_rewards([f"{results}:wrong"])
        with pytest.raises(ValueError, match=words):
            wrong(completions=["a"])


def test_a_reward_may_be_a_coroutine(file):
    (later,) = load_rewards([f"{file}:later"])
    assert asyncio.run(later(completions=["a", "b"])) == [1.0, 1.0]
