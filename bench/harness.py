"""What every benchmark shares: the machine's name, interleaved timing, results as JSON and a table."""
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch

import s2ft


def machine() -> Dict[str, Any]:
    """Enough to read a number by: processor, threads, versions, what is compiled."""
    info = {"date": time.strftime("%Y-%m-%d"), "processor": _processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version(), "s2ft": s2ft.build_info()}
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
    return info


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def interleaved(steps: Dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> Dict[str, List[float]]:
    """Seconds of every step, in turn A B C A B C …, so that a machine that drifts slows all alike."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name, step in steps.items():
            _synchronize()
            begin = time.perf_counter()
            step()
            _synchronize()
            if i >= warmup:
                times[name].append(time.perf_counter() - begin)
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(times: Dict[str, List[float]], name: str, against: str) -> float:
    """Median of the ratios round by round: what drifts within the run cancels."""
    return statistics.median(a / b for a, b in zip(times[name], times[against]))


def save(path: Path, results: Dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
