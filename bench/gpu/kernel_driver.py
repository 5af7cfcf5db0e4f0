"""Builds and runs driver.cu: all CUDA kernels without PyTorch, under the sanitizers of CUDA or of the compiler.

    python bench/gpu/kernel_driver.py [--cpu] [--arch 9.0] [--folder build/gpu] [--only memcheck ...]

On a GPU nvcc compiles it, and it runs plainly, with large sizes, and under the tools of compute-sanitizer. With --cpu
g++ compiles it with the simulator of tests/cuda_on_cpu and the sanitizers for addresses and undefined behaviour, and it
runs under several schedules of the threads. nvcc is the one that setup.py builds the kernels with. A tool that is not
there is named. First the tool must find an access behind a buffer that the driver makes on purpose.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import cuda_home, find_tool, runtime_flags
from limited import Done, run_limited

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NO_NVCC = "no nvcc: set CUDA_HOME to a CUDA toolkit, put nvcc on PATH, or install it as docs/install.md says"
FOUND = 9  # exit status of compute-sanitizer if it found something; the driver itself has 0, 1 and 2
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow"
CPU_FLAGS = (
    SANITIZE,
    "-std=c++20",
    "-O1",
    "-g1",
    "-Wno-unknown-pragmas",
    "-DS2FT_CUDA_ON_CPU",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-x",
    "c++",
)
SCHEDULES = (["--seed", "0"], ["--seed", "1"], ["--seed", "2", "--blocks", "2"])


@dataclass
class KernelRun:
    """One run of the driver: under which tool, and what it did. `done` is None if the tool is not there."""

    name: str
    done: Done | None
    why: str = ""  # why it did not run

    @property
    def state(self) -> str:
        if self.done is None:
            return "NOT RUN"
        if self.done.was_ended:
            return f"PARTLY RUN, {self.done.why}"
        return "passed" if self.done.good else f"FAILED, {self.done.why}"

    def __str__(self) -> str:
        return f"{self.state}  {self.name}\n{self.done.text.strip()[-2000:] if self.done else self.why}"


class MissingTool(RuntimeError):
    """A compiler that is not there, so that the driver is not run. One that fails is another RuntimeError."""


def sources() -> list[Path]:
    return [HERE / "driver.cu", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


def compile_all(command: list[str], link: list[str], folder: Path, jobs: int, limit: float) -> Path:
    """Compile every source by `command`, in parallel, and link the program.

    Raises:
        RuntimeError: A compiler failed, or `limit` seconds were not enough. The message has its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (HERE, ROOT / "csrc", ROOT / "tests" / "cuda_on_cpu")]
    end = time.monotonic() + limit

    def call(target: Path, command: list[str]) -> str:
        target.unlink(missing_ok=True)
        done = run_limited(command, end - time.monotonic(), target.with_suffix(".log"))
        if not done.good:
            raise RuntimeError(f"{' '.join(command)}\n{done.why}\n{done.text[-3000:]}")
        return str(target)

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        return call(target, [*command, *includes, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, sources()))
    program = folder / "driver"
    call(program, [*link, *objects, "-o", str(program)])
    return program


def build_for_gpu(folder: Path, arch: str, jobs: int, limit: float) -> Path:
    """Compile the driver by nvcc for one compute capability, such as "9.0".

    Raises:
        MissingTool: There is no nvcc.
        RuntimeError: It failed, or `limit` seconds were not enough.
    """
    home = cuda_home()
    if home is None:
        raise MissingTool(NO_NVCC)
    number = arch.replace(".", "")
    nvcc = str(home / "bin" / "nvcc")
    flags = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-gencode", f"arch=compute_{number},code=sm_{number}"]
    return compile_all(flags, [*flags, *runtime_flags(home)], folder, jobs, limit)


def build_for_cpu(folder: Path, jobs: int, limit: float) -> Path:
    """Compile the driver with the simulator and the compiler's sanitizers.

    Raises:
        MissingTool: There is no C++ compiler.
        RuntimeError: It failed, or `limit` seconds were not enough.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise MissingTool("no C++ compiler: install g++, or set CXX")
    return compile_all([compiler, *CPU_FLAGS], [compiler, SANITIZE], folder, jobs, limit)


def run(name: str, command: list[str], program: Path, limit: float) -> KernelRun:
    """Run a command that contains the driver's path. Its output is kept beside the driver."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}  # the simulator has its own stacks
    return KernelRun(name, run_limited(command, limit, program.with_name("run.log"), environment=environment))


def planted(name: str, command: list[str], program: Path, limit: float) -> KernelRun:
    """Run a command that a sanitizer must end. It has passed if its exit status is not 0."""
    done = run(name, command, program, limit).done
    if done.status is None:
        return KernelRun(name, done)
    if done.good:
        return KernelRun(name, Done(1, done.text, "the access behind a buffer was not found"))
    return KernelRun(name, Done(0, "found"))


def runs_on_gpu(program: Path, only: list[str], limit: float) -> Iterator[KernelRun]:
    if "plain" in only:
        yield run("plain, with large sizes", [str(program), "--large"], program, limit)
    checker = find_tool("compute-sanitizer")
    for tool in [tool for tool in TOOLS if tool in only]:
        if checker is None:
            yield KernelRun(tool, None, why="no compute-sanitizer: it is in the CUDA toolkit")
            continue
        command = [checker, "--tool", tool, "--error-exitcode", str(FOUND)]
        if tool == "memcheck":
            yield planted("memcheck finds a planted access", [*command, str(program), "--overrun"], program, limit)
            command += ["--leak-check", "full"]
        yield run(tool, [*command, str(program)], program, limit)


def runs_on_cpu(program: Path, limit: float) -> Iterator[KernelRun]:
    yield planted("a planted access behind a buffer is found", [str(program), "--overrun"], program, limit)
    for schedule in SCHEDULES:
        name = f"addresses, leaks, undefined behaviour, {' '.join(schedule)}"
        yield run(name, [str(program), *schedule], program, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="run the kernels on the CPU, in the simulator")
    parser.add_argument("--arch", default=None, help="compute capability; default: that of the first GPU")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--only", nargs="+", choices=("plain", *TOOLS), default=["plain", *TOOLS], help="GPU only")
    parser.add_argument("--limit", type=float, default=60, help="seconds for each run")
    args = parser.parse_args()
    jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    try:
        if args.cpu:
            found = runs_on_cpu(build_for_cpu(args.folder, jobs, 10 * args.limit), args.limit)
        else:
            program = build_for_gpu(args.folder, args.arch or capability(), jobs, 10 * args.limit)
            found = runs_on_gpu(program, args.only, args.limit)
    except MissingTool as missing:
        sys.exit(f"NOT RUN build\n{missing}")
    except RuntimeError as error:
        sys.exit(f"FAILED build\n{error}")
    good = True
    for one in found:
        print(one, flush=True)
        good &= one.done is None or one.done.good
    sys.exit(0 if good else 1)


def capability() -> str:
    """The compute capability of the first GPU. Only this needs PyTorch."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU: give --arch and run the driver yourself, or give --cpu")
    return "{}.{}".format(*torch.cuda.get_device_capability())


if __name__ == "__main__":
    main()
