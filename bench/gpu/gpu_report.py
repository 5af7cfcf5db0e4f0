"""The report of bench/gpu/check_gpu.py: stages, acceptance lines, and the files that are rewritten after each stage."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, PARTLY, NOT_RUN = "passed", "FAILED", "PARTLY RUN", "NOT RUN"  # partly: its time ended
TEXT = 6000  # characters of a stage's output in the report, from its end


@dataclass
class GpuStage:
    """What a stage did: its state, a sentence why if it is not passed, its output, and numbers for acceptance."""

    name: str
    state: str
    reason: str = ""
    text: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Acceptance:
    """A line of the table: what is wanted, what was found, and whether it holds. None if nothing was measured."""

    what: str
    wanted: str
    found: str
    holds: bool | None


# --- acceptance -----------------------------------------------------------------------------------

SHAPES = ("llama-3-8b", "llama-3.2-3b", "llama-3.2-1b")  # of the steps, the largest that ran is judged
RATIOS = (  # method, other method, wanted at most, of what
    ("s2ft", "frozen", 1.03, "ms"),
    ("s2ft", "lora7", 0.85, "ms"),
    ("s2ft", "lora7", 0.80, "peak_bytes"),
)
CALLED = {
    "s2ft": "S²FT",
    "frozen": "frozen",
    "lora7": "LoRA on seven projections (adapters in bfloat16)",
    "ms": "time of a step",
    "peak_bytes": "peak memory of a step",
}


def acceptance(stages: dict[str, GpuStage], on_gpu: bool) -> list[Acceptance]:
    """Judge the numbers of all stages. A number of a CPU is never held against a limit that is meant for a GPU."""
    lines = [sanitizers_line(stages), base_line(stages)]
    if not on_gpu:
        return lines
    lines += [product_line(stages), *(copy_line(stages, op) for op in ("act_mul", "act_mul, backward"))]
    for liger in (False, True):
        lines += [ratio_line(stages, liger, *row) for row in RATIOS]
    return lines


def sanitizers_line(stages: dict[str, GpuStage]) -> Acceptance:
    runs = data_of(stages, "sanitizers").get("runs", [])
    ran = [run for run in runs if run["status"] is not None]  # to its end
    wrong = sum(run["status"] != 0 for run in ran)
    found = f"{wrong} of {len(ran)} runs" + (f", {len(runs) - len(ran)} not run" if len(ran) < len(runs) else "")
    holds = None if not ran else False if wrong else None if len(ran) < len(runs) else True
    return Acceptance("runs of the kernel driver with an error", "0", found if runs else "", holds)


def steps_of(stages: dict[str, GpuStage]) -> list[dict[str, Any]]:
    """The results of all methods in all stages that measured steps, with the shape and the method."""
    found = []
    for name in ("steps", "mixtures"):
        for run in data_of(stages, name).get("runs", []):
            found += [{**run, **result, "method": method} for method, result in run["results"].items()]
    return found


def base_line(stages: dict[str, GpuStage]) -> Acceptance:
    what, key = "the base as before, bit for bit, after a method is taken off", "base_as_before"
    flags = [result[key] for result in steps_of(stages) if key in result]
    return Acceptance(what, "all", f"{sum(flags)} of {len(flags)}" if flags else "", all(flags) if flags else None)


def product_line(stages: dict[str, GpuStage]) -> Acceptance:
    rows = [row for row in kernel_rows(stages, "sliced_linear") if row["case"].startswith("4096 ×")]
    ratios = [row["us"] / row["rivals_us"]["frozen"] for row in rows]
    # The function copies the weight, unlike the layers, which write into it: a tenth of the product on an H100.
    return at_most("sliced_linear to F.linear at 4096 tokens, the worst case", 1.25, max(ratios, default=None))


def copy_line(stages: dict[str, GpuStage], op: str) -> Acceptance:
    ratios = [row["us"] / row["floor_us"] for row in kernel_rows(stages, op)]
    return at_most(f"{op} to a copy of as many bytes, the worst case", 1.1, max(ratios, default=None))


def kernel_rows(stages: dict[str, GpuStage], op: str) -> list[dict[str, Any]]:
    return [row for row in data_of(stages, "kernels").get("rows", []) if row["op"] == op]


def ratio_line(stages: dict[str, GpuStage], liger: bool, method: str, other: str, limit: float, key: str) -> Acceptance:
    """Judge a method against another at the largest shape at which both ran: a small GPU has no room for all."""
    results = [result for result in steps_of(stages) if result["liger"] == liger and result.get(key)]
    values = {(result["shape"], result["method"]): result[key] for result in results}
    judged = [shape for shape in SHAPES if (shape, method) in values and (shape, other) in values]
    ratio = values[judged[0], method] / values[judged[0], other] if judged else None
    shape = judged[0] if judged else SHAPES[0]
    what = f"{CALLED[key]}, {shape}, {'with' if liger else 'without'} Liger: {CALLED[method]} to {CALLED[other]}"
    return at_most(what, limit, ratio)


def at_most(what: str, limit: float, found: float | None) -> Acceptance:
    if found is None:
        return Acceptance(what, f"≤ {limit}", "", None)
    return Acceptance(what, f"≤ {limit}", f"{found:.3f}", found <= limit)


def data_of(stages: dict[str, GpuStage], name: str) -> dict[str, Any]:
    return stages[name].data if name in stages else {}


# --- the files ------------------------------------------------------------------------------------


class GpuReport:
    """Collects stages and rewrites report.md and report.json after each of them.

    Args:
        folder: Where the files are written. It is made if it does not exist.
        title: First line of the report.
        on_gpu: Whether the limits that are meant for a GPU are judged.
    """

    def __init__(self, folder: Path, title: str, on_gpu: bool) -> None:
        self.folder, self.title, self.on_gpu = folder, title, on_gpu
        self.stages: dict[str, GpuStage] = {}
        self.lines: list[Acceptance] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, stage: GpuStage) -> None:
        stage.text, stage.reason = without_paths(stage.text), without_paths(stage.reason)
        self.stages[stage.name] = stage
        self.lines = acceptance(self.stages, self.on_gpu)
        write(self.folder / "report.md", self.text())
        content = {
            "title": self.title,
            "date": time.strftime("%Y-%m-%d"),
            "acceptance": [asdict(line) for line in self.lines],
            "stages": {name: asdict(stage) for name, stage in self.stages.items()},
        }
        write(self.folder / "report.json", json.dumps(content, indent=1) + "\n")
        print(summary(stage), flush=True)

    @property
    def good(self) -> bool:
        """Whether no stage failed and no measured number missed its limit. What did not run is not counted."""
        return not any(s.state == FAILED for s in self.stages.values()) and not any(
            line.holds is False for line in self.lines
        )

    def counts(self) -> str:
        states = [stage.state for stage in self.stages.values()]
        missed = [line for line in self.lines if line.holds is False]
        open_lines = [line for line in self.lines if line.holds is None]
        holding = len(self.lines) - len(missed) - len(open_lines)
        passed, failed, partly, not_run = (states.count(state) for state in (PASSED, FAILED, PARTLY, NOT_RUN))
        return (
            f"{passed} stages passed, {failed} failed, {partly} ran in part, {not_run} did not run. "
            f"{holding} acceptance lines hold, {len(missed)} do not, {len(open_lines)} were not measured"
        )

    def text(self) -> str:
        """The report as Markdown."""
        marks: dict[bool | None, str] = {True: "holds", False: "**MISSED**", None: "not measured"}
        rows = [f"| {line.what} | {line.wanted} | {line.found} | {marks[line.holds]} |" for line in self.lines]
        parts = [
            f"# {self.title}",
            f"{time.strftime('%Y-%m-%d')}. {self.counts()}.",
            "\n".join(["| | wanted | found | |", "|---|---|---|---|", *rows]),
            "\n".join(f"- {summary(stage)}" for stage in self.stages.values()),
        ]
        for stage in self.stages.values():
            if stage.text.strip():
                parts.append(f"## {stage.name}\n\n```text\n{stage.text.strip()[-TEXT:]}\n```")
        return "\n\n".join(parts) + "\n"


def summary(stage: GpuStage) -> str:
    return f"{stage.name}: {stage.state}, {stage.seconds:.0f} s" + (f": {stage.reason}" if stage.reason else "")


def write(path: Path, text: str) -> None:
    """Replace a file in one step, so that a run that is killed leaves a whole one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def without_paths(text: str) -> str:
    """Replace the folders of this machine, so that a report can be published."""
    places = {f"{ROOT}{os.sep}": "", str(ROOT): ".", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON"}
    for path, name in places.items():
        text = text.replace(path, name)
    return text.replace(str(Path.home()), "~") if Path.home() != Path("/") else text


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def about_machine(on_gpu: bool, versions: Callable[[str], str]) -> dict[str, Any]:
    """What a reader must know about the machine and its packages."""
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    found |= {"python": platform.python_version(), "torch": torch.__version__}
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = torch.cuda.get_device_name(0)
        found["gpus"] = torch.cuda.device_count()
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["GPU memory, GiB"] = round(properties.total_memory / 2**30, 1)
        found["CUDA of PyTorch"] = torch.version.cuda
    for package in ("transformers", "peft", "liger_kernel", "trl", "bitsandbytes"):
        found[package] = versions(package)
    return found
