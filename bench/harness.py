"""Functions that all benchmarks share: a description of the machine, interleaved timing, and results as JSON."""

import copy
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    timed: Callable[[Any], Any] | None = None,
) -> dict[str, list[Any]]:
    """Measure the seconds of every step.

    Each round runs all steps, so that changes of the machine's speed affect all of them. The order is random in each
    round, so that no step always profits from the cache contents of another one. On a GPU, times are taken by device
    events, without the host's time to launch the step.

    Args:
        steps: The steps by name.
        rounds: Number of measured rounds.
        warmup: Number of rounds before them that are not measured.
        flush: True empties the GPU's second-level cache before each step.
        timed: Function that runs a step and returns its seconds, or several of them. Default: by device events
            on a GPU, else by the clock.

    Returns:
        The seconds of each round, by name of the step.
    """
    timed = timed or (_device_seconds if torch.cuda.is_available() else _host_seconds)
    times: dict[str, list[Any]] = {name: [] for name in steps}
    order = random.Random(0)
    for i in range(warmup + rounds):
        for name, step in order.sample(list(steps.items()), len(steps)):
            if flush and torch.cuda.is_available():
                torch.empty(256 << 20, dtype=torch.uint8, device="cuda").zero_()  # nothing is left in the cache
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


def median_ratio(times: dict[str, list[float]], name: str, against: str) -> float:
    """The median of the ratios of each round. Slow changes of the machine's speed cancel in a ratio."""
    return statistics.median(a / b for a, b in zip(times[name], times[against]))


def in_process(script: str, *options: str, **environment: str) -> Any:
    """Run a benchmark's script in a process of its own.

    Args:
        script: The file.
        options: Its options.
        environment: Variables beside those of this process.

    Returns:
        The JSON of the last line that it prints.

    Raises:
        RuntimeError: The process failed. The message has the end of what it wrote.
    """
    command, environment = [sys.executable, script, *options], {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fill_slices(model: nn.Module, std: float) -> None:
    """Give every trained parameter random values, in place of a training."""
    for parameter in [one for one in model.parameters() if one.requires_grad]:
        parameter.data.normal_(std=std)


def loras_of(base: nn.Module, names: Sequence[str], rank: int, **options: Any) -> nn.Module:
    """A model of PEFT, on a copy of the base, with a random LoRA on down_proj for every name.

    Args:
        base: The base.
        names: Names of the adapters. The first is active.
        rank: Their rank.
        options: Arguments of PEFT's get_peft_model and add_adapter, such as `autocast_adapter_dtype`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config, adapter_name=names[0], **options)
    for name in names[1:]:
        model.add_adapter(name, config, **options)
    return model.eval()


def drift(model: nn.Module, base: nn.Module) -> float:
    """The largest difference of a weight of PEFT's model to the base, after all adapters are unmerged."""
    weights = dict(base.named_parameters())
    return max(
        float((weight.float() - weights[_name_in_base(key)].float()).abs().max())
        for key, weight in model.named_parameters()
        if "lora_" not in key
    )


def _name_in_base(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def same_bits(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and buffers of two models with the same names are equal."""
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
