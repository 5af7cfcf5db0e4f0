"""Word problems: training and held-out ones share nothing, worked answers are right, and files are what they were."""

import gzip
import re

import pytest
from support.inside import PROBLEMS, problem_set

from bench.experiments import families
from bench.experiments.problems import TRAIN_TEMPLATES, demo_file, is_held_out, make_problems

TRAIN, HELD_OUT = make_problems(1500, held_out=False), make_problems(400, held_out=True)


def test_combinations_of_numbers_are_disjoint_in_any_order():
    train, held_out = ({tuple(sorted(p["numbers"])) for p in side} for side in (TRAIN, HELD_OUT))
    assert not train & held_out and {p["template"] for p in TRAIN}.isdisjoint(p["template"] for p in HELD_OUT)
    assert all(is_held_out(*numbers) for numbers in held_out) and not any(is_held_out(*n) for n in train)


@pytest.mark.parametrize("side", [TRAIN, HELD_OUT], ids=["train", "held out"])
def test_worked_answers_are_right_and_short(side):
    for problem in side:
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", problem["output"])
        assert len(steps) == 2 and len(problem["output"]) < 60
        assert all(eval(f"{left} {sign} {right}") == int(result) > 0 for left, sign, right, result in steps)
        assert steps[1][0] == steps[0][3]
        assert problem["output"].endswith(f" The answer is {problem['answer']}.") and steps[1][3] == problem["answer"]
        assert all(str(number) in problem["instruction"] for number in problem["numbers"])
        assert "{" not in problem["instruction"]


def test_the_file_of_the_demo_has_these_problems():
    assert gzip.decompress(PROBLEMS.read_bytes()) == gzip.decompress(demo_file()) and PROBLEMS.stat().st_size < 150_000
    train, held_out = make_problems(1024, False), make_problems(96, True)
    for side, rows in ((False, train), (True, held_out)):
        found = problem_set(2000, side)
        assert [one.output for one in found] == [row["output"] for row in rows]
        assert found[0].question.startswith(rows[0]["instruction"]) and found[0].answer == rows[0]["answer"]
    assert len(problem_set(5, False)) == 5


# ---- held-out families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["FAMILIES", "TRAIN_TEMPLATES"])
def test_families_are_those_that_were_frozen_and_a_changed_template_is_noticed(side, monkeypatch):
    families.check_frozen()
    changed = {name: (*texts[:-1], texts[-1] + " ") for name, texts in getattr(families, side).items()}
    monkeypatch.setattr(families, side, changed)
    with pytest.raises(ValueError, match="changed since they were frozen"):
        families.check_frozen()


def test_problems_of_families_share_nothing_with_training_problems_and_are_right():
    held_out = families.held_out_problems(200)
    assert not {one["template"] for one in held_out} & {text for texts in TRAIN_TEMPLATES.values() for text in texts}
    assert not {tuple(sorted(one["numbers"])) for one in held_out} & {tuple(sorted(p["numbers"])) for p in TRAIN}
    for problem in held_out:
        for left, sign, right, result in re.findall(r"(\d+) ([+*/-]) (\d+) = (\d+)", problem["output"]):
            assert eval(f"{left} {sign} {right}") == int(result)
        assert problem["output"].endswith(f"The answer is {problem['answer']}.")
        assert all(re.search(rf"\b{number}\b", problem["instruction"]) for number in problem["numbers"])
