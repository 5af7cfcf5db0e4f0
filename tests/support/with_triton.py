"""Runs the tests of the Triton kernels in Triton's interpreter: python tests/support/with_triton.py [pytest's arguments]

The environment takes all other packages from the one that runs this.
"""

import os
import subprocess
import sys

from releases import ROOT, environment

RELEASE = "3.9.0"


def main(arguments: list[str]) -> int:
    python = environment("triton", f"triton=={RELEASE}")
    command = [python, "-m", "pytest", "-m", "triton", "-n", "0", *(arguments or ["tests/triton_kernels"])]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
