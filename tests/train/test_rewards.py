"""Rewards: what the built-in ones read in a text, and how functions of a file are found and checked."""

import pytest
from support.inside import RewardError, answer_equal, answer_format, check_columns, is_equal, load_rewards, numbers

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
    ("x = -3", "\u22123"),
    ("about 3.14159", "3.1416"),
    ("1.5e3 metres", "1500"),
    ("it is 50%", "50%"),
    ("<think>maybe 3</think> 4", "4"),
    ("<answer> 12 apples </answer> and 13 more", "12"),
    ("5.", "5"),
    (".5", "0.5"),
    ("(B)", "B"),
    ("The answer is B.", "b"),
    ("The answer is b.", "B"),
    ("(b)", "B"),
    ("The answer isn't 5. It is 6.", "6"),
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
    ("The answer isn't 5, it is 6.", "5"),
    ("I", "I am"),
    ("Paris is nice", "Paris"),
    ("9" * 10_000, "9"),
    ("1e999", "0"),
]


@pytest.mark.parametrize(("text", "answer"), EQUAL + UNEQUAL)
def test_a_right_answer_is_found_and_a_wrong_one_is_none(text, answer):
    assert is_equal(text, answer) == ((text, answer) in EQUAL)


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

async def later(completions, **_):
    return [1.0] * len(completions)

def helper(text):
    return text

def strict(completions):
    return []

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in.python" / "mine.py"
    path.parent.mkdir()
    path.write_text(FILE)
    return path


def test_functions_of_a_file_are_rewards(file):
    short, right, later, again = load_rewards([f"{file}:short,right,later", "answer_equal"])
    assert short(completions=["abc"], prompts=[""]) == [-3.0] and later(completions=["a", "b"]) == [1.0, 1.0]
    assert right(completions=["a", "b"], answer=["a", "a"]) == [1.0, 0.0]
    assert (short.__name__, again.__name__) == ("short", "answer_equal")  # TRL logs these names


def test_a_file_without_names_gives_every_function_with_completions(file):
    assert [reward.__name__ for reward in load_rewards([str(file)])] == ["short", "right", "later", "strict"]


def test_a_function_of_a_package_is_a_reward():
    (reward,) = load_rewards(["trl.rewards.think_format_reward"])
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>\n2 + 2\n</think>\n4", "4")]
    assert reward(completions=completions, prompts=["", ""]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["answer_equals"], "'answer_equals'; did you mean answer_equal"),
        (["nowhere.short"], "'nowhere.short'"),
        (["trl.rewards.think_format"], "'think_format'; did you mean think_format_reward"),
        (["mine.py:rihgt"], "'rihgt'; did you mean right"),
        (["mine.py:number"], "number in mine.py .*int"),
        (["mine.py:helper"], "mine.py:helper .*completions"),
        (["broken.py"], "broken.py .*ModuleNotFoundError.*nosuch_package"),
        (["empty.py"], "empty.py .*completions"),
        (["missing.py"], "missing.py"),
        ([], "at least one"),
    ],
)
def test_a_wrong_name_is_explained(names, words, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "broken.py").write_text("import nosuch_package")
    (file.parent / "empty.py").write_text("x = 1")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_rewards(names)


def test_columns_are_checked_before_the_training(file):
    check_columns(load_rewards([f"{file}:right", "format"]), ["prompt", "answer"])
    with pytest.raises(ValueError, match="answer_equal .*'answer' .*prompt, "):
        check_columns(load_rewards(["answer_equal"]), ["prompt", "answers"])
    with pytest.raises(ValueError, match=r"strict .*\*\*_"):
        check_columns(load_rewards([f"{file}:strict"]), ["prompt"])


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("1 / 0", "ZeroDivisionError in line 1"),
        ("[1, 2]", "2 rewards for 1 completions"),
        ("1", "list of numbers, got int"),
        ("[float('nan')]", "nan"),
        ("['a']", "list of numbers"),
    ],
)
def test_a_reward_that_fails_or_returns_something_else_is_named(result, words, tmp_path):
    (tmp_path / "results.py").write_text(f"def wrong(completions, **_): return {result}")
    (wrong,) = load_rewards([str(tmp_path / "results.py")])
    with pytest.raises(RewardError, match=f"results.py:wrong.*{words}"):
        wrong(completions=["a"])
