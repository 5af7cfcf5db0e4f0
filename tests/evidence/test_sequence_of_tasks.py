"""The tasks of bench/evidence/sequence.py, as far as they need no package with data."""

from bench.evidence.sequence import TASKS, VARIANTS, answers_of, orders_of
from bench.evidence.tasks import Question
from s2ft.reproduce.studies.sequence import check_modes


def question(answer: str) -> Question:
    return Question(f"Reverse this list of words: {answer}", answer, answer)


def test_choices_are_different_orders_and_contain_the_answer():
    for answer in ("a, b, c", "a, b, c, d, e", "a, a, b"):
        one = question(answer)
        choices = orders_of(one, [one])
        assert answer in choices and len(set(choices)) == len(choices)
        assert 3 <= len(choices) <= 4
        assert {tuple(sorted(choice.split(", "))) for choice in choices} == {tuple(sorted(answer.split(", ")))}
        assert choices == orders_of(one, [one])  # the same in every run


def test_the_right_order_has_no_fixed_place():
    places = {orders_of(question(f"a, {n}, c"), []).index(f"a, {n}, c") for n in range(40)}
    assert places == {0, 1, 2, 3}


def test_answers_of_a_task_are_listed_once():
    assert answers_of(question("b"), [question("b"), question("a"), question("b")]) == ["a", "b"]


def test_variants_are_those_of_the_recipe():
    assert set(check_modes(VARIANTS).values()) == {"on_top", "continue", "merge"}
    assert len(TASKS) == 5
