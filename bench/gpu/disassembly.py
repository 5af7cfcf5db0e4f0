"""Registers, spills and instructions of every CUDA kernel, from its machine code. It needs nvcc, and no GPU.

    python bench/gpu/disassembly.py [source ...] [--archs 80 90 100] [--output FILE]

Every kernel is compiled for every architecture and disassembled. Its main loop is the innermost loop that moves the
most bytes of global memory. For a kernel over the elements of tensors, "an element" is the number of instructions of
that loop divided by the elements that one pass computes. The exit status is 1 if a kernel spills registers or uses
local memory, or if the compiler warns.

nvdisasm is taken from PATH, from the CUDA toolkit, or from the package nvidia-cuda-nvdisasm.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cuda_toolkit import cuda_home

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
RESULTS = ROOT / "bench" / "results" / "disassembly.json"
ARCHS = (75, 80, 90, 100, 120)
SIZES = {"float": 4, "double": 8, "Half": 2, "BFloat16": 2}
# Kernels whose main loop computes elements, and how many tensors the loop stores them to.
STORED = {"act_mul_items": 1, "act_mul_backward_items": 2}


@dataclass
class Kernel:
    """What the machine code of one kernel says.

    Attributes:
        name: Its name with template arguments, such as act_mul_items<Silu, BFloat16>.
        source: The file it stands in.
        arch: Compute capability without the point, such as 90.
        registers: Registers of a thread.
        spills: Bytes of registers that are stored to and loaded from local memory.
        local: Bytes of local memory of a thread.
        shared: Bytes of shared memory of a block.
        instructions: Instructions of the main loop, or of the whole kernel if it has no loop.
        loaded: Bytes of global memory that one thread loads in one pass of the main loop.
        stored: Bytes that it stores.
        products: Tensor core instructions in the main loop.
        an_element: Instructions for each element, or None if the main loop does not compute elements.
    """

    name: str
    source: str
    arch: int
    registers: int
    spills: int
    local: int
    shared: int
    instructions: int
    loaded: int
    stored: int
    products: int
    an_element: float | None


def toolkit() -> Path:
    """The folder of the CUDA toolkit."""
    home = cuda_home()
    if home is None:
        raise SystemExit("no nvcc: set CUDA_HOME to a CUDA toolkit, or put nvcc on PATH")
    return home


def find_nvdisasm(home: Path) -> str:
    """The path of nvdisasm."""
    installed = Path(sysconfig.get_paths()["purelib"], "nvidia")
    places = [home / "bin" / "nvdisasm", *sorted(installed.glob("cu*/bin/nvdisasm"))]
    found = shutil.which("nvdisasm") or next((str(place) for place in places if place.exists()), None)
    if found is None:
        raise SystemExit("no nvdisasm: `pip install nvidia-cuda-nvdisasm`, or put a CUDA toolkit's nvdisasm on PATH")
    return found


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result


def compile_source(home: Path, source: Path, arch: int, cubin: Path) -> str:
    """Compile a source as setup.py does, with warnings as errors, and return what ptxas says about its kernels."""
    flags = ["-std=c++20", "-O3", f"-arch=sm_{arch}", "-cubin", "-Werror", "all-warnings", "-Xptxas", "-v"]
    environment = {**os.environ, "CUDA_HOME": str(home)}
    return run([str(home / "bin" / "nvcc"), *flags, str(source), "-o", str(cubin)], env=environment).stderr


def resources(ptxas: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, spilled bytes, local and shared bytes, by the kernel's mangled name."""
    found = {}
    for part in ptxas.split("Compiling entry function '")[1:]:

        def number(pattern: str, text: str = part) -> int:
            return sum(map(int, re.findall(pattern, text)))

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        local = number(r"(\d+) bytes stack frame")
        found[part.partition("'")[0]] = (number(r"Used (\d+) registers"), spills, local, number(r"(\d+) bytes smem"))
    return found


def functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    """The mangled name of every kernel, and its lines: labels ("name:") and instructions."""
    name, lines = None, []
    for line in disassembly.splitlines():
        if start := re.match(r"\.text\.(\S+):", line):
            name, lines = start[1], []
        elif line.startswith(("\t.section", "//----")):
            if name:
                yield name, lines
            name = None
        elif name and (label := re.match(r"(\.L_x_\d+):", line)):
            lines.append(label[0])
        elif name and (instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?) ;", line)):
            lines.append(instruction[1])
    if name:
        yield name, lines


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions of every innermost loop."""
    labels = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    spans = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        # A branch of a line to itself is the padding after the end.
        if target and labels.get(target[1], end) < end - 1:
            spans.append((labels[target[1]], end))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[line for line in lines[begin : end + 1] if not line.endswith(":")] for begin, end in inner]


def moved(instructions: list[str], kind: str) -> int:
    """Bytes of global memory that the instructions load (LDG) or store (STG)."""
    total = 0
    for line in instructions:
        if found := re.search(rf"\b{kind}\.(\S+)", line):
            bits = re.search(r"\.(128|64|U16|S16|U8|S8)\b", "." + found[1])
            total += {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[bits[1]] if bits else 4
    return total


def readable(name: str) -> str:
    """act_mul_items<Silu, BFloat16> for the mangled name."""
    filt = shutil.which("c++filt") or shutil.which("cu++filt")
    full = run([filt, name]).stdout.strip() if filt else name
    full = re.sub(r"\(anonymous namespace\)::|s2ft::|cuda::|^void ", "", full)
    return re.sub(r"\(int\)|\(bool\)|(?<=\w)::_GLOBAL__N\w*", "", full[: full.index("(", full.find(">") + 1)])


def kernels(home: Path, nvdisasm: str, source: Path, arch: int) -> list[Kernel]:
    """Compile a source and read the machine code of its kernels."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        known = resources(compile_source(home, source, arch, cubin))
        code = run([nvdisasm, "-c", str(cubin)]).stdout if known else ""
    result = []
    for mangled, lines in functions(code):
        if mangled not in known:
            continue
        name = readable(mangled)
        whole = [line for line in lines if not line.endswith(":")]
        main = max(loops(lines), key=lambda loop: (moved(loop, "LDG") + moved(loop, "STG"), -len(loop)), default=whole)
        stored = moved(main, "STG")
        outputs, sizes = STORED.get(name.partition("<")[0]), [SIZES[t] for t in re.findall(r"\w+", name) if t in SIZES]
        elements = stored / sizes[0] / outputs if outputs and sizes else 0
        products = sum(bool(re.search(r"\b[A-Z]MMA\b", line)) for line in main)
        numbers = (len(main), moved(main, "LDG"), stored, products, len(main) / elements if elements else None)
        result.append(Kernel(name, source.name, arch, *known[mangled], *numbers))
    return sorted(result, key=lambda kernel: kernel.name)


def show(kernel: Kernel) -> str:
    each = f"{kernel.an_element:6.1f}" if kernel.an_element else "     -"
    return (
        f"{kernel.arch:4} {kernel.registers:5} {kernel.spills:6} {kernel.local:5} {kernel.shared:6} "
        f"{kernel.instructions:5} {kernel.loaded:4} {kernel.stored:4} {kernel.products:3} {each}  {kernel.name}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="*", metavar="source", help="names such as act_mul.cu; default: all")
    parser.add_argument("--archs", nargs="+", type=int, default=ARCHS, help="default: 75 80 90 100 120")
    parser.add_argument("--output", type=Path, help="default: bench/results/disassembly.json if everything is compiled")
    args = parser.parse_args()
    unknown = set(args.sources) - {source.name for source in SOURCES}
    if unknown:
        parser.error(f"no source is called {', '.join(sorted(unknown))}")
    home = toolkit()
    nvdisasm = find_nvdisasm(home)
    print("arch  regs spills local shared instr load store mma element  kernel", flush=True)
    found = []
    for source in SOURCES:
        for arch in args.archs if not args.sources or source.name in args.sources else ():
            found += (here := kernels(home, nvdisasm, source, arch))
            for kernel in here:
                print(show(kernel), flush=True)
    if not found:
        raise SystemExit("no kernel was found in the machine code")
    versions = {
        "date": time.strftime("%Y-%m-%d"),
        "nvcc": run([str(home / "bin" / "nvcc"), "--version"]).stdout.splitlines()[-1],
        "nvdisasm": run([nvdisasm, "--version"]).stdout.splitlines()[-1],
    }
    complete = not args.sources and set(args.archs) == set(ARCHS)
    if output := args.output or (RESULTS if complete else None):
        import json

        rows = ",\n".join(" " + json.dumps(asdict(kernel)) for kernel in found)
        output.write_text(f'{{"versions": {json.dumps(versions)},\n"kernels": [\n{rows}\n]}}\n', encoding="utf-8")
    print(versions)
    bad = [kernel for kernel in found if kernel.spills or kernel.local]
    for kernel in bad:
        print(f"{kernel.name} on sm_{kernel.arch} spills {kernel.spills} bytes and uses {kernel.local} bytes of memory")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
