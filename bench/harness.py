"""Functions that all benchmarks share: a description of the machine, interleaved timing, and results as JSON."""

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import s2ft

DELAY = 2_000_000  # clock cycles, about a millisecond: enough to launch a few operators from Python


def machine() -> dict[str, Any]:
    """What a reader must know about the machine: processor, threads, versions, and the compiled kernels."""
    if torch.cuda.is_available():
        torch.cuda.init()  # build_info() then lists the CUDA kernels
    info = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "s2ft": s2ft.build_info(),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def interleaved(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    flush: bool = False,
    timed: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, list[float]]:
    """Measure the seconds of every step.

    Each round runs all steps, so that changes of the machine's speed affect all of them. The order is random in each
    round, so that no step always profits from the cache contents of another one. On a GPU, times are taken by device
    events, without the host's time to launch the step.

    Args:
        steps: The steps by name.
        rounds: Number of measured rounds.
        warmup: Number of rounds before them that are not measured.
        flush: True empties the GPU's second-level cache before each step.
        timed: Function that runs a step and returns its seconds. Default: by device events on a GPU, else by the clock.

    Returns:
        The seconds of each round, by name of the step.
    """
    timed = timed or (_device_seconds if torch.cuda.is_available() else _host_seconds)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for i in range(warmup + rounds):
        for name, step in order.sample(list(steps.items()), len(steps)):
            if flush and torch.cuda.is_available():
                _flush_cache()
            seconds = timed(step)
            if i >= warmup:
                times[name].append(seconds)
    return times


def _host_seconds(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def processor_seconds(step: Callable[[], Any]) -> float:
    """The seconds that this thread computes during a step. Other programs on the machine hardly change them."""
    begin = time.thread_time()
    step()
    return time.thread_time() - begin


def _device_seconds(step: Callable[[], Any]) -> float:
    """The device's time alone: the host enqueues the step while the device still waits, unless the step is long."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def _flush_cache() -> None:
    torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()


def median_ratio(times: dict[str, list[float]], name: str, against: str) -> float:
    """The median of the ratios of each round. Slow changes of the machine's speed cancel in a ratio."""
    return statistics.median(a / b for a, b in zip(times[name], times[against]))


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
