"""Checks the wheel in dist/: python release/check_wheel.py [--file] [PYTHON:TORCH …] (make wheel-check)

First the file: tags, size, the Python and C symbols that it uses, the libraries that it needs and the architectures of
its GPU code. Then it is installed in empty environments that have PyTorch alone, and release/run_installed.py runs
there. A pair such as 3.11:2.11 names the Python and the release of PyTorch; "newest" is a release too. Environments
with PyTorch take about 5 GB each and are kept in build/wheel. With --file the file alone is checked.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from environments import ARCHS, ROOT, TORCH_LIBRARIES, environment, packages_of

TOOLS = ("auditwheel", "abi3audit", "nvidia-cuda-cuobjdump")
PAIRS = ("3.11:2.11", "3.12:2.12", "3.12:2.13", "3.13:newest")
LARGEST = 8_000_000  # bytes
SLOWEST = 30.0  # seconds of a processor, for s2ft and all that it needs beyond PyTorch; a busy machine takes longer
GLIBC = (2, 28)
TORCH_PREFIXES = ("aoti_torch_", "torch_")  # PyTorch's stable ABI
PYTHON_PREFIXES = ("Py", "_Py")
WEAK = ("_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_pure_virtual")


def newest_wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("s2ft-*-abi3-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise SystemExit("dist/ has no wheel with the tag abi3: run make wheel")
    return wheels[-1]


# --- the file ------------------------------------------------------------------------------------------


def wrong_tags(name: str) -> str:
    """What is wrong with the tags in a wheel's name, or an empty string.

    Example:
        >>> wrong_tags("s2ft-1.0-cp310-abi3-manylinux_2_28_x86_64.whl")
        ''
        >>> wrong_tags("s2ft-1.0-cp310-abi3-linux_x86_64.whl")
        'its platform is linux_x86_64, not manylinux up to glibc 2.28'
    """
    python, abi, platforms = name.removesuffix(".whl").split("-")[-3:]
    if (python, abi) != ("cp310", "abi3"):
        return f"its tag is {python}-{abi}, not cp310-abi3"
    return next((text for text in map(wrong_platform, platforms.split(".")) if text), "")


def wrong_platform(platform: str) -> str:
    """The same for one tag of a platform."""
    match = re.fullmatch(r"manylinux_(\d+)_(\d+)_x86_64", platform)
    if match and (int(match[1]), int(match[2])) <= GLIBC:
        return ""
    return f"its platform is {platform}, not manylinux up to glibc 2.28"


def strange_symbols(module: Path) -> list[str]:
    """Symbols that the module needs and that neither Python, nor PyTorch's stable ABI, nor a versioned library has.

    auditwheel checks the versioned ones and abi3audit Python's. A name without a version that belongs to nobody would
    be missing when the module is loaded on another machine.
    """
    listed = subprocess.run(
        ["readelf", "--dyn-syms", "--wide", module], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[7] for line in listed.splitlines() if len(line.split()) > 7 and line.split()[6] == "UND"]
    known = (*TORCH_PREFIXES, *PYTHON_PREFIXES)
    return [name for name in names if "@" not in name and not name.startswith(known) and name not in WEAK]


def wrong_libraries(wheel: Path, python: Path) -> list[str]:
    """What auditwheel finds wrong, and prints what it finds: versions of symbols, and libraries of no system."""
    show = [python, "-m", "auditwheel", "show", "--json", wheel]
    audit = json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    symbols = ", ".join(sorted(version for versions in audit["versioned_symbols"].values() for version in versions))
    print(f"auditwheel: its symbols fit {audit['sym_tag']} ({symbols})")
    print(f"auditwheel: beside those of every Linux it needs {', '.join(audit['external_libs']) or 'no libraries'}")
    problems = [wrong_platform(audit["sym_tag"])]
    foreign = sorted(set(audit["external_libs"]) - set(TORCH_LIBRARIES))
    problems += [f"it needs {name}, which is not a library of PyTorch" for name in foreign]
    problems += ["it needs a processor that is newer than x86-64"] if audit["unsupported_isa"] else []
    return [text for text in problems if text]


def code_of_gpus(python: Path, module: Path) -> list[str]:
    """The architectures of the GPU code in the module, as cuobjdump lists them: ["sm_75", …, "ptx compute_120"]."""
    (cuobjdump,) = (packages_of(python) / "nvidia").glob("*/bin/cuobjdump")
    found: set[str] = set()
    for option, label in (("--list-elf", ""), ("--list-ptx", "ptx ")):
        listed = subprocess.run([cuobjdump, option, module], capture_output=True, text=True).stdout
        found |= {label + arch for arch in re.findall(r"\.(sm_\w+)\.(?:cubin|ptx)", listed)}
    return sorted(found, key=lambda text: (text.startswith("ptx"), int(re.sub(r"\D", "", text))))


def check_file(wheel: Path, python: Path) -> list[str]:
    """Print what the wheel is. Returns what is wrong with it."""
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB")
    problems = [text for text in (wrong_tags(wheel.name),) if text]
    if size > LARGEST:
        problems.append(f"it has {size} bytes, more than {LARGEST}")
    problems += wrong_libraries(wheel, python)
    audit = [python, "-m", "abi3audit", "--strict", "--verbose", wheel]
    done = subprocess.run(audit, capture_output=True, text=True)
    print(f"abi3audit: {' '.join((done.stdout + done.stderr).split())}")
    if done.returncode:
        problems.append("it uses Python's functions that are not in the stable ABI of Python 3.10")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder)
        (module,) = Path(folder).glob("s2ft/_C*.so")
        record = json.loads((Path(folder) / "s2ft" / "_build.json").read_text())
        strange, code = strange_symbols(module), code_of_gpus(python, module)
    print(f"GPU code: {', '.join(code)}")
    if module.name != "_C.abi3.so" or not (record["compiled"] and record["cuda"]):
        problems.append(f"its module is {module.name}, its record {record}")
    if strange:
        problems.append(f"nobody has the symbols {', '.join(strange)}")
    archs = (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHS).replace("+PTX", "").split(";")
    lacking = [arch for arch in archs if f"sm_{arch.replace('.', '')}" not in code]
    if lacking:
        problems.append(f"it has no GPU code for {', '.join(lacking)}")
    unwanted = [name for name in names if not name.startswith(("s2ft/", "s2ft-"))]
    if unwanted:
        problems.append(f"it installs {unwanted[0]}")
    return problems


# --- installed -----------------------------------------------------------------------------------------


def interpreter(version: str) -> Path | None:
    """A Python of this version: on PATH, of pyenv, or of uv."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    roots = (pyenv / "versions", Path.home() / ".local" / "share" / "uv" / "python")
    candidates += [path for root in roots for path in sorted(root.glob(f"*{version}.*/bin/python{version}"))]
    for candidate in filter(None, candidates):
        ask = [candidate, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
        done = subprocess.run(ask, capture_output=True, text=True)
        if done.stdout.startswith(f"{version} "):
            return Path(done.stdout.strip().partition(" ")[2])
    return None


def processor_seconds() -> float:
    """Processor time of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def try_out(wheel: Path, version: str, torch: str) -> dict:
    """Install the wheel in a new environment that has PyTorch alone, and run release/run_installed.py there."""
    found = interpreter(version)
    if found is None:
        return {"python": version, "torch": torch, "skipped": f"there is no Python {version} here"}
    wanted = "torch" if torch == "newest" else f"torch=={torch}.*"
    base = environment(f"torch-{torch}-python-{version}", (wanted,), found)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([found, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        (packages_of(python) / "torch.pth").write_text(f"{packages_of(base)}\n")
        begin, used = time.time(), processor_seconds()
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", wheel], check=True)
        seconds, used = time.time() - begin, processor_seconds() - used
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CUDA", "S2FT"))}
        done = subprocess.run(
            [python, "-I", ROOT / "release" / "run_installed.py"],
            cwd=folder,
            env={**kept, "PATH": str(python.parent), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    result = {"python": version, "torch": torch, "install_seconds": seconds, "processor_seconds": used}
    if done.returncode:
        return {**result, "failed": (done.stdout + done.stderr)[-3000:]}
    return {**result, **json.loads(done.stdout.splitlines()[-1])}


def row(result: dict) -> str:
    """A result as a row of a table."""
    if "skipped" in result or "failed" in result:
        text = f"not run: {result['skipped']}" if "skipped" in result else "FAILED"
        return f"| {result['python']} | {result['torch']} | {text} | | | | |"
    return (
        f"| {result['python']} | {result['torch']} | CUDA {result['torch_cuda']} | {result['install_seconds']:.0f} s "
        f"({result['processor_seconds']:.0f} s of a processor) | "
        f"{result['import_seconds']:.1f} s | {result['ops']} + {result['cuda_ops']} | {result['difference']:.1e} |"
    )


def check_installed(wheel: Path, pairs: list[str]) -> list[str]:
    """Print a table of the wheel in the environments that the pairs name. Returns what is wrong."""
    print("\n| Python | PyTorch | built for | install beyond PyTorch | import | ops on CPU + CUDA | difference |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results, problems = [], []
    for pair in pairs:
        result = try_out(wheel, *pair.split(":"))
        print(row(result), flush=True)
        results.append(result)
        if "failed" in result:
            problems.append(f"Python {result['python']}, PyTorch {result['torch']}: {result['failed']}")
        if result.get("processor_seconds", 0) > SLOWEST:
            problems.append(f"pip takes {result['processor_seconds']:.0f} s of a processor, more than {SLOWEST:.0f}")
    if all("skipped" in result for result in results):
        problems.append("it ran nowhere")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="PYTHON:TORCH", help=f"default: {' '.join(PAIRS)}")
    parser.add_argument("--file", action="store_true", help="check the file alone")
    given = parser.parse_args()
    wheel = newest_wheel()
    problems = check_file(wheel, environment("tools", TOOLS))
    if not given.file:
        problems += check_installed(wheel, given.pairs)
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    print("\nthe wheel is good" if not problems else "\nthe wheel is not good")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
