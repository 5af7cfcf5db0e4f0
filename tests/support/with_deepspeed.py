"""Runs the tests that need DeepSpeed, in an environment that has it: python tests/support/with_deepspeed.py [pytest's]

The environment takes all other packages from the one that runs this. Without a GPU the ranks run on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

from releases import ROOT, environment


def main(arguments: list[str]) -> int:
    # DeepSpeed's setup needs the PyTorch that is here, and its first run compiles an operation with ninja
    python = environment("deepspeed", "--no-build-isolation", "setuptools", "wheel", "deepspeed")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [python, "-m", "pytest", "-m", "deepspeed", "-n", "0", *(arguments or ["tests"])]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
