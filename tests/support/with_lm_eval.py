"""Runs the tests that need lm-eval, in an environment that has it: python tests/support/with_lm_eval.py [pytest's]

The environment takes all other packages from the one that runs this.
"""

import subprocess
import sys

from releases import ROOT, environment

RELEASE = "0.4.13"


def main(arguments: list[str]) -> int:
    python = environment("lm-eval", f"lm-eval=={RELEASE}")
    command = [python, "-m", "pytest", "-m", "lm_eval", "-n", "0", *(arguments or ["tests/integrations"])]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
