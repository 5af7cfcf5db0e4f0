"""A part of all combinations of three parameters. Every pair of values of two parameters is in at least one of them."""

from collections.abc import Iterable


def pairs(first: Iterable, second: Iterable, third: Iterable) -> list[tuple]:
    """Return a Latin square: all pairs of the first two parameters, and the values of the third in turn.

    The third parameter must have no more values than each of the others.
    """
    first, second, third = list(first), list(second), list(third)
    if len(third) > min(len(first), len(second)):
        raise ValueError(f"the third parameter must be the shortest, got {len(first)}, {len(second)}, {len(third)}")
    return [(one, other, third[(i + j) % len(third)]) for i, one in enumerate(first) for j, other in enumerate(second)]
