"""The description of a benchmark of an op, and its measurement."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import interleaved, median_ratio

Step = Callable[[], Any]


@dataclass
class Case:
    """One op at one size: `ours`, its `rivals`, and the floor, a lower bound of the time for all of them."""

    op: str
    name: str
    ours: Step
    rivals: dict[str, Step] = field(default_factory=dict)
    moved: int = 0  # bytes that must be read and written; the floor is a copy that moves as many bytes
    product: Step | None = None  # the matrix product that must be computed; it is the floor instead of a copy
    note: dict[str, Any] = field(default_factory=dict)  # other numbers to save with the result


def copy_of(moved: int, device: str) -> Step:
    """A copy that reads and writes `moved` bytes in all."""
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """Measure one case for about `seconds`, its steps in turn. Returns medians and ratios."""
    steps = {"s2ft": case.ours, **case.rivals}
    floor = case.product or (copy_of(case.moved, device) if case.moved else None)
    if floor is not None:
        steps["floor"] = floor
    begin = time.perf_counter()
    interleaved(steps, 1, warmup=1, flush=True)
    rounds = int(min(500, max(9, seconds / max(1e-6, (time.perf_counter() - begin) / 2))))
    times = interleaved(steps, rounds, flush=True)
    return {
        "op": case.op,
        "case": case.name,
        "rounds": rounds,
        "microseconds": {name: 1e6 * statistics.median(values) for name, values in times.items()},
        "s2ft faster than": {name: median_ratio(times, name, "s2ft") for name in case.rivals},
        "s2ft to floor": None if floor is None else median_ratio(times, "s2ft", "floor"),
        "note": case.note,
    }


def line_of(result: dict[str, Any]) -> str:
    """One row of the table."""
    floor = result["s2ft to floor"]
    rivals = "  ".join(
        f"{name} {result['microseconds'][name]:,.0f} µs, {ratio:.2f} ×"
        for name, ratio in result["s2ft faster than"].items()
    )
    return (
        f"{result['op']:<21}{result['case']:<44}{result['microseconds']['s2ft']:>11,.0f} µs"
        f"{'' if floor is None else f'{floor:8.2f} × floor':>16}   {rivals}"
        + "".join(f"  {name}: {value}" for name, value in result["note"].items())
    )
