"""Times of functions, measured in turn."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(
    steps: Mapping[str, Callable[[], Any]], rounds: int, *, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Measure the seconds of functions.

    Each round calls all of them, so that a change of the machine's speed affects all. Their order is another one in
    each round.

    Args:
        steps: Functions without arguments, by name.
        rounds: Number of measured rounds.
        warmup: Number of rounds before them that are not measured.
        device: "cpu", or "cuda" to wait for the GPU before and after each call.

    Returns:
        The seconds of each measured round, by name.

    Raises:
        ValueError: There is nothing to measure.

    Example:
        >>> from s2ft.reproduce.timing import interleaved
        >>> times = interleaved({"sum": lambda: sum(range(10))}, rounds=3)
        >>> len(times["sum"])
        3
    """
    if not steps or rounds < 1:
        raise ValueError(f"steps must be functions by name, and rounds at least 1, got {len(steps)} and {rounds}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for number in range(warmup + rounds):
        for name in order.sample(list(steps), len(steps)):
            seconds = seconds_of(steps[name], device)
            if number >= warmup:
                times[name].append(seconds)
    return times


def seconds_of(step: Callable[[], Any], device: str = "cpu") -> float:
    """Return the seconds of one call.

    Args:
        step: Function without arguments.
        device: "cpu", or "cuda" to wait for the GPU before and after the call.
    """
    start = now(device)
    step()
    return now(device) - start


def now(device: str = "cpu") -> float:
    """Return the time in seconds of a clock for differences. A GPU has then done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(seconds: list[float]) -> float:
    """Return the median in milliseconds, with four digits."""
    return float(f"{1000 * statistics.median(seconds):.4g}")


def ratio(times: Mapping[str, list[float]], name: str, against: str) -> float:
    """Return the median of the ratios of each round, with four digits. Slow changes of the machine's speed cancel."""
    return float(f"{statistics.median(a / b for a, b in zip(times[name], times[against], strict=True)):.4g}")
