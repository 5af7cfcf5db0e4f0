"""A part of all combinations of parameters runs by default, so that every value is in at least one of them."""

from collections.abc import Iterable

import pytest


def pairs(first: Iterable, second: Iterable, third: Iterable) -> list[tuple]:
    """Return a Latin square: all pairs of the first two parameters, and the values of the third in turn.

    The third parameter must have no more values than each of the others.
    """
    first, second, third = list(first), list(second), list(third)
    if len(third) > min(len(first), len(second)):
        raise ValueError(f"the third parameter must be the shortest, got {len(first)}, {len(second)}, {len(third)}")
    return [(one, other, third[(i + j) % len(third)]) for i, one in enumerate(first) for j, other in enumerate(second)]


def pairs_mostly_slow(cases: Iterable, first: Iterable, second: Iterable) -> list:
    """Return the rows of :func:`pairs`, of which one for each case runs by default and the others are slow.

    The rows that run have every pair of the second and third parameter, each with another case.
    """
    cases, first, second = list(cases), list(first), list(second)
    rows = pairs(cases, first, second)
    chosen = {i * len(first) + (i // len(second)) % len(first) for i in range(len(cases))}
    return [row if number in chosen else pytest.param(*row, marks=pytest.mark.slow) for number, row in enumerate(rows)]


def rest_slow(cases: Iterable, some: Iterable) -> list:
    """Return all cases. Those that are not in `some` are slow."""
    return [case if case in some else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def in_turn(cases: Iterable, values: Iterable) -> list:
    """Return all pairs of a case and a value. By default each case runs with one value, in turn; the others are slow."""
    values = list(values)
    return [
        (case, value) if position == number % len(values) else pytest.param(case, value, marks=pytest.mark.slow)
        for number, case in enumerate(cases)
        for position, value in enumerate(values)
    ]
