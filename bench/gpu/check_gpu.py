"""One command that says whether s2ft is right and fast on this GPU. It writes report.md and report.json.

    make gpu                                                    # or, with any Python that has PyTorch for CUDA:
    python bench/gpu/check_gpu.py [--out build/gpu-report] [--seconds 570] [--only build tests ...] [--cpu]

Stages, each in processes of their own:

    build         the kernels for this GPU, in place
    sanitizers    the kernel driver: plainly, under memcheck, racecheck, initcheck and synccheck
    tests         every test marked cuda
    kernels       every op against its floor and other ways, by graph replay
    steps         training steps at the shapes of LLaMA-3-8B, 1B and 3B, with and without Liger-Kernel
    mixtures      training steps of a mixture of experts
    bank          batches with many adapters
    switch        switching between adapters
    ncu           counters of the kernels by Nsight Compute; with --cpu their instructions by disassembly

The report is rewritten after every stage. The command ends within --seconds: a stage that takes too long is ended, and
is partly run; one for which no time is left does not run. What does not run is named with the reason. The exit status
is 1 if a stage failed or a measured number missed its limit. Nothing is downloaded; models have random weights.

--cpu runs every stage without a GPU: the kernel driver in the simulator under the compiler's sanitizers, and all else
on the CPU at tiny sizes with one thread. Its times say nothing about a GPU and are not judged.
"""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cuda_toolkit import cuda_home, find_tool
from gpu_report import FAILED, NOT_RUN, PARTLY, PASSED, GpuReport, GpuStage, about_machine
from kernel_driver import (
    NO_NVCC,
    SCHEDULES,
    TOOLS,
    KernelRun,
    MissingTool,
    build_for_cpu,
    build_for_gpu,
    runs_on_cpu,
    runs_on_gpu,
)
from limited import LEAST, NO_TIME, Done, run_limited

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SPARE = 5.0  # seconds that are kept for the last report
INFO = """
import json, torch, s2ft
if torch.cuda.is_available():
    torch.cuda.init()  # registers the CUDA kernels
print(json.dumps(s2ft.build_info()))
"""
PYTEST = {1: "a test failed", 2: "tests could not be collected", 5: "no test ran"}  # by exit status


def version_of(module: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def has(module: str) -> bool:
    return version_of(module) != "not installed"


@dataclass
class Work:
    """The options of a run, and its clock."""

    folder: Path
    end: float  # of time.monotonic()
    cpu: bool
    reserved: float = 0.0  # seconds that later stages need at least

    @property
    def device(self) -> str:
        return "cpu" if self.cpu else "cuda"

    def left(self, most: float) -> float:
        """Seconds that a process may take: at most `most` on a GPU, and not what later stages need."""
        left = self.end - time.monotonic() - SPARE - self.reserved
        return left if self.cpu else min(most, left)

    def environment(self) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        found["HF_HUB_OFFLINE"] = "1"
        if self.cpu:  # other work on the machine would stop a thread that all others wait for
            found["OMP_NUM_THREADS"] = "1"
        return found

    def run(self, name: str, command: list[str], most: float, **variables: str) -> Done:
        """Run a command of the project for at most `most` seconds."""
        log, environment = self.folder / "logs" / f"{name}.txt", {**self.environment(), **variables}
        return run_limited(command, self.left(most), log, environment=environment, folder=ROOT)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def script(path: str, *arguments: str) -> list[str]:
    return python(str(ROOT / "bench" / path), *arguments)


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def state_of(done: Done) -> str:
    if done.good:
        return PASSED
    if done.was_ended:
        return PARTLY
    return NOT_RUN if done.status is None else FAILED


def outcome(name: str, done: Done, data: dict[str, Any] | None = None, why: str = "") -> GpuStage:
    """A stage that ran one command."""
    return GpuStage(name, state_of(done), why or done.why, done.text, data or {})


# --- stages ---------------------------------------------------------------------------------------


def build(work: Work) -> GpuStage:
    if work.cpu:
        variables = {"S2FT_BUILD": "cpu"}
    elif cuda_home() is None:
        return GpuStage("build", NOT_RUN, NO_NVCC)
    else:
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        variables = {"S2FT_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability}
    built = work.run("build", python("setup.py", "-q", "build_ext", "--inplace"), 240, **variables)
    if not built.good:
        return outcome("build", built)
    asked = work.run("build-info", python("-W", "ignore", "-c", INFO), 60)
    try:
        info = json.loads(asked.text.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return outcome("build", Done(1, built.text[-1500:] + asked.text, "s2ft could not be imported"))
    return built_stage(info, built.text, work.cpu)


def built_stage(info: dict[str, Any], output: str, cpu: bool) -> GpuStage:
    """Judge what s2ft.build_info() says after the build. Every op with a C++ kernel also has one in CUDA."""
    compiled = sorted(op for op, devices in info["ops"].items() if "CPU" in devices)
    missing = [] if cpu else [op for op in compiled if info["cuda_ops"].get(op) != "CUDA"]
    text = json.dumps(info, indent=1)
    if not compiled or missing:
        why = f"no CUDA kernel of {', '.join(missing)}: {info['cuda_reason']}" if missing else info["reason"]
        return GpuStage("build", FAILED, why, f"{output[-1500:]}\n{text}", {"info": info})
    return GpuStage("build", PASSED, f"{len(compiled)} ops have kernels", text, {"info": info})


def sanitizers(work: Work) -> GpuStage:
    folder, jobs = work.folder / "driver", max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    try:
        if work.cpu:
            found = runs_on_cpu(build_for_cpu(folder, jobs, work.left(240)), work.left(60) / 2)
        else:
            capability = "{}.{}".format(*torch.cuda.get_device_capability())
            found = runs_on_gpu(
                build_for_gpu(folder, capability, jobs, work.left(240)), ["plain", *TOOLS], work.left(60)
            )
    except MissingTool as missing:
        return GpuStage("sanitizers", NOT_RUN, str(missing))
    except RuntimeError as error:
        return GpuStage("sanitizers", FAILED, "the kernel driver was not built", str(error))
    runs = []
    for one in found:
        runs.append(one)
        if work.left(60) < LEAST:
            break
    return sanitizer_stage(runs, 1 + len(SCHEDULES) if work.cpu else 2 + len(TOOLS))


def sanitizer_stage(runs: list[KernelRun], wanted: int) -> GpuStage:
    """The stage of these runs. It has passed only if all `wanted` runs are there and without an error."""
    text = "\n".join(map(str, runs))
    data = {"runs": [{"name": one.name, "status": one.done and one.done.status, "state": one.state} for one in runs]}
    wrong = [one.name for one in runs if one.done and one.done.status]
    ended = [one.name for one in runs if one.done and one.done.status is None]
    missing = [one.name for one in runs if one.done is None]
    if wrong:
        return GpuStage("sanitizers", FAILED, f"errors in: {', '.join(wrong)}", text, data)
    if ended or len(runs) < wanted:
        why = f"too slow: {', '.join(ended)}" if ended else "no time was left for all tools"
        return GpuStage("sanitizers", PARTLY, why, text, data)
    if missing:
        return GpuStage("sanitizers", NOT_RUN, f"{', '.join(missing)}: {runs[-1].why}", text, data)
    return GpuStage("sanitizers", PASSED, f"{len(runs)} runs without an error", text, data)


def cuda_test_files() -> list[str]:
    """Every test file with a test marked cuda."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.cuda" in path.read_text(encoding="utf-8")]


MOST_WORKERS = 8
WORKER_MEMORY = 12 << 30  # bytes: a context, the pools of Triton's trials, and models of the tests


def worker_count(cores: int, free_memory: int | None) -> int:
    """How many workers of pytest run side by side.

    Args:
        cores: Of the processor.
        free_memory: Bytes of the GPU that they share; None without one.
    """
    for_memory = MOST_WORKERS if free_memory is None else free_memory // WORKER_MEMORY
    return max(1, min(MOST_WORKERS, cores, for_memory))


def tests(work: Work) -> GpuStage:
    """On a GPU all tests marked cuda; on a CPU those of the kernels in the simulator, and of tests/gpu.

    Tests that take most of a GPU's memory, or limit it, come first, one after the other.
    """
    free_memory = None if work.cpu else torch.cuda.mem_get_info()[0]
    workers = worker_count(os.cpu_count() or 1, free_memory)
    side_by_side = ["-n", str(workers), "--dist", "worksteal"] if has("pytest_xdist") and workers > 1 else []
    if work.cpu:
        return tests_stage(
            [pytest_run("tests", work, side_by_side, ["-m", "not slow", "tests/gpu", "tests/cuda_on_cpu"])]
        )
    files = cuda_test_files()
    alone = pytest_run("tests-alone", work, [], ["-m", "cuda and alone", *files])
    return tests_stage([alone, pytest_run("tests", work, side_by_side, ["-m", "cuda and not alone", *files])])


def pytest_run(name: str, work: Work, workers: list[str], chosen: list[str]) -> Done:
    options = ["-q", "-ra", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--durations=5"]
    return work.run(name, python("-m", "pytest", *options, *workers, *chosen), 600)  # the first has no Triton cache


def tests_stage(runs: list[Done]) -> GpuStage:
    """The stage of these runs of pytest."""
    text, counts = "\n".join(done.text for done in runs), {}
    for done in runs:
        for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.text[-400:]):
            counts[word] = counts.get(word, 0) + int(number)
    failed = [PYTEST.get(done.status, done.why) for done in runs if done.status]
    failed += ["a test failed before the time ended" for done in runs if done.was_ended and shows_failure(done.text)]
    if failed:
        return GpuStage("tests", FAILED, failed[0], text, counts)
    unfinished = [done.why for done in runs if done.status is None]
    if unfinished:
        state = NOT_RUN if all(done.why == NO_TIME for done in runs) else PARTLY
        return GpuStage("tests", state, unfinished[0], text, counts)
    if not counts.get("passed"):
        return GpuStage("tests", FAILED, PYTEST[5], text, counts)
    skipped = f", {counts['skipped']} skipped for reasons in the text" if counts.get("skipped") else ""
    return GpuStage("tests", PASSED, f"{counts['passed']} tests passed{skipped}", text, counts)


def shows_failure(text: str) -> bool:
    """Whether a line of pytest's progress, such as "..F.s  [ 26%]", has a failure or an error."""
    lines = re.findall(r"^([.sxXFE]+)(?: +\[ *\d+%\])?$", text, re.M)
    return any("F" in line or "E" in line for line in lines)


def with_results(name: str, work: Work, command: list[str], most: float, output: Path) -> GpuStage:
    """A stage of one command that writes its numbers to `output`."""
    output.unlink(missing_ok=True)
    return outcome(name, work.run(name, command, most), read_json(output))


def kernels(work: Work) -> GpuStage:
    output = work.folder / "kernels.json"
    command = script("gpu/op_times.py", "--device", work.device, "--output", str(output))
    return with_results("kernels", work, command, 120, output)


def step_runs(cpu: bool) -> list[list[str]]:
    """The options of each run of steps.py, the most important first."""
    if cpu:
        return [["--shape", "tiny", "--batch", "2", "--length", "32", "--steps", "4"]]
    runs = [["--shape", "llama-3-8b", "--profile"]]
    if has("liger_kernel"):
        runs.append(["--shape", "llama-3-8b", "--profile", "--liger"])
    for shape in ("llama-3.2-1b", "llama-3.2-3b"):
        runs.append(["--shape", shape])
        if has("liger_kernel"):
            runs.append(["--shape", shape, "--liger"])
    return runs


def measured_steps(name: str, work: Work, runs: list[list[str]], most: float) -> GpuStage:
    """Run steps.py once for each list of options, and collect what every method measured."""
    found, texts, wrong, late = [], [], [], []
    for number, options in enumerate(runs):
        output = work.folder / f"{name}-{number}.json"
        output.unlink(missing_ok=True)
        command = script("gpu/steps.py", *options, "--device", work.device, "--output", str(output))
        done, called = work.run(f"{name}-{number}", command, most), " ".join(options)
        if done.status is None:
            late.append(f"{called}: {done.why}")
        elif not done.good:
            wrong.append(f"{called}: {done.why}")
            texts.append(done.text[-1500:])
        if output.exists():
            content = read_json(output)
            found.append({key: content[key] for key in ("shape", "results")} | {"liger": content["liger"] == "True"})
            texts.append(step_table(found[-1]))
    results = [result for run in found for result in run["results"].values()]
    wrong += [result["error"] for result in results if "error" in result]
    changed = [r for r in results if not r.get("frozen_as_before", True) or not r.get("base_as_before", True)]
    if changed:
        wrong.append(f"{len(changed)} methods changed frozen weights")
    state = FAILED if wrong else PARTLY if late else PASSED
    if not found and not wrong:
        state = NOT_RUN
    return GpuStage(name, state, "; ".join(wrong + late), "\n\n".join(texts), {"runs": found})


def step_table(run: dict[str, Any]) -> str:
    """The results of one run of steps.py as text."""
    lines = [
        f"{run['shape']}{', Liger' * run['liger']}",
        f"{'':<16}{'ms':>9}{'host ms':>9}{'to frozen':>11}{'tokens/s':>10}{'peak GB':>9}{'trained':>15}"
        "  kernels, ms by kind",
    ]
    floor = run["results"].get("frozen", {}).get("ms")
    for method, r in run["results"].items():
        if "ms" not in r:
            lines.append(f"{method:<16} {r.get('not_run') or r.get('error')}")
            continue
        kinds = ", ".join(f"{kind} {ms:.1f}" for kind, ms in r.get("kinds_ms", {}).items())
        changed = (
            "" if r.get("frozen_as_before", True) and r.get("base_as_before", True) else "  FROZEN WEIGHTS CHANGED"
        )
        lines.append(
            f"{method:<16}{r['ms']:>9.1f}{r['host_ms']:>9.1f}{r['ms'] / floor if floor else 0:>11.3f}"
            f"{r['tokens_per_second']:>10,.0f}{(r['peak_bytes'] or 0) / 1e9:>9.1f}{r['trained']:>15,}"
            f"  {r.get('kernels', '')} {kinds}{changed}"
        )
    return "\n".join(lines)


def steps(work: Work) -> GpuStage:
    stage = measured_steps("steps", work, step_runs(work.cpu), 150)
    if work.cpu:
        stage.text += "\n\nLiger-Kernel needs a GPU: no step with it was measured"
    elif not has("liger_kernel"):
        stage.text += "\n\nliger-kernel is not installed: no step with it was measured"
    return stage


def mixtures(work: Work) -> GpuStage:
    small = ["--shape", "tiny-experts", "--batch", "2", "--length", "32", "--steps", "4"]
    return measured_steps("mixtures", work, [small if work.cpu else ["--shape", "qwen3-30b-a3b-4-layers"]], 90)


def bank(work: Work) -> GpuStage:
    output = work.folder / "bank.json"
    sizes = ["--shape", "tiny", "--tokens", "2"] if work.cpu else ["--shape", "llama-3.2-1b", "--tokens", "16"]
    command = script("mixed_batches.py", *sizes, "--rounds", "3", "--device", work.device, "--output", str(output))
    return with_results("bank", work, command, 90, output)


def switch(work: Work) -> GpuStage:
    output = work.folder / "switch.json"
    sizes = ["--shape", "tiny", "--channels", "8"] if work.cpu else ["--shape", "llama-3.2-1b", "--channels", "245"]
    more = ["--switches", "100", "--rounds", "5", "--device", work.device, "--output", str(output)]
    return with_results("switch", work, script("switch.py", *sizes, *more), 60, output)


def instructions(work: Work) -> GpuStage:
    """What a machine without a GPU can say of the kernels' code: instructions, registers and spills."""
    if cuda_home() is None:
        return GpuStage("ncu", NOT_RUN, "counters need a GPU, and disassembly needs nvcc")
    output = work.folder / "disassembly.json"
    command = script("gpu/disassembly.py", "--archs", "90", "--output", str(output))
    stage = with_results("ncu", work, command, 120, output)
    if "no nvdisasm" in stage.text:
        return GpuStage("ncu", NOT_RUN, "counters need a GPU, and disassembly needs nvdisasm", stage.text)
    stage.reason = stage.reason or "counters need a GPU; this is the disassembly for sm_90"
    return stage


def ncu(work: Work) -> GpuStage:
    tool, program = find_tool("ncu"), work.folder / "driver" / "driver"
    if work.cpu:
        return instructions(work)
    if tool is None:
        return GpuStage("ncu", NOT_RUN, "Nsight Compute is not installed")
    if not program.exists():
        return GpuStage("ncu", NOT_RUN, "the stage sanitizers builds the program that it runs")
    chosen = ["--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis"]
    done = work.run("ncu", [tool, "--clock-control", "none", *chosen, "-c", "40", str(program), "--large"], 60)
    if "ERR_NVGPUCTRPERM" in done.text:
        return GpuStage("ncu", NOT_RUN, "this machine does not allow its users to read the counters", done.text)
    return outcome("ncu", done)


@dataclass
class PlannedStage:
    """A stage and the seconds that it needs at least on a GPU, which earlier stages leave to it."""

    run: Callable[[Work], GpuStage]
    least: float


STAGES = {
    "build": PlannedStage(build, 60),
    "sanitizers": PlannedStage(sanitizers, 40),
    "tests": PlannedStage(tests, 60),
    "kernels": PlannedStage(kernels, 40),
    "steps": PlannedStage(steps, 120),
    "mixtures": PlannedStage(mixtures, 25),
    "bank": PlannedStage(bank, 25),
    "switch": PlannedStage(switch, 20),
    "ncu": PlannedStage(ncu, 0),
}


def run_stages(names: list[str], work: Work, report: GpuReport) -> None:
    for number, name in enumerate(names):
        wanted = sum(STAGES[later].least for later in names[number + 1 :])
        work.reserved = min(wanted, max(0.0, (work.end - time.monotonic()) * 0.7))  # less if the whole limit is short
        begin = time.monotonic()
        if work.left(STAGES[name].least or LEAST) < LEAST:
            stage = GpuStage(name, NOT_RUN, NO_TIME)
        else:
            try:
                stage = STAGES[name].run(work)
            except Exception as error:  # a fault of this command must not hide the other stages
                stage = GpuStage(name, FAILED, f"{type(error).__name__}: {error}")
        stage.seconds = time.monotonic() - begin
        report.add(stage)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-report", help="folder of the report")
    parser.add_argument("--seconds", type=float, default=570, help="time limit of the whole command; default: 570")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), help="default: all stages")
    parser.add_argument("--cpu", action="store_true", help="run every stage without a GPU, at tiny sizes")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        parser.error(
            f"PyTorch {torch.__version__} finds no GPU: install a PyTorch for CUDA and a driver, or give --cpu"
        )
    return args


def main() -> None:
    begin = time.monotonic()
    args = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the processes of the stage too
    out = args.out.resolve()
    title = "s2ft without a GPU: the CPU form of make gpu" if args.cpu else f"s2ft on {torch.cuda.get_device_name(0)}"
    report = GpuReport(out, title, not args.cpu)
    work = Work(out, begin + args.seconds, args.cpu)
    about = about_machine(not args.cpu, version_of)
    report.add(GpuStage("machine", PASSED, "", "\n".join(f"{key}: {value}" for key, value in about.items()), about))
    run_stages([name for name in STAGES if name in args.only], work, report)
    print(f"{report.counts()}\nreport: {out / 'report.md'}")
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()
