"""Writes the releases that the tests have passed with: python release/constraints.py [--python 3.11]

uv resolves the packages that the Makefile installs to their newest releases, for all supported Pythons at once. The
result is written only if the suite "newest" has passed with it, as bench/results/matrix.json tells:

- constraints.txt, with which the Makefile and CI install. PyTorch and what belongs to its build are left out, so that
  every device and build keeps its own.
- s2ft/tested.json, by which s2ft knows a release that is newer than any tested one.
"""

import argparse
import json
import subprocess
import sys
import tomllib

from environments import ROOT, environment
from resolve import name_of, requirements
from suites import MATRIX

CONSTRAINTS = ROOT / "constraints.txt"
TESTED = ROOT / "s2ft" / "tested.json"
EXTRAS = "train,test,quantized,serve,peft,docs"
# Those whose names, signatures and numbers s2ft depends on.
WATCHED = ("accelerate", "peft", "torch", "transformers", "trl")
# A torch needs its own releases of these.
OF_TORCH = ("torch", "torchvision", "triton", "setuptools", "sympy", "nvidia-", "cuda-")
HEADER = "# The releases with which the tests have passed, on every supported Python. `make constraints` writes this.\n"


def resolved(lowest_python: str) -> list[str]:
    """Let uv resolve what the Makefile installs. Returns lines such as "trl==1.16.0", some with a marker.

    Args:
        lowest_python: The lowest supported Python, such as "3.11".
    """
    python = environment("uv", ("uv",))
    command = [python.with_name("uv"), "pip", "compile", "--universal", "--python-version", lowest_python]
    options = ["--no-header", "--no-annotate", "--quiet", "--upgrade", "-"]
    done = subprocess.run(
        [*command, *options], input="\n".join(requirements(EXTRAS)), text=True, stdout=subprocess.PIPE, check=True
    )
    return done.stdout.splitlines()


def belongs_to_torch(line: str) -> bool:
    name = name_of(line)
    return any(name == one or (one.endswith("-") and name.startswith(one)) for one in OF_TORCH)


def watched_releases(lines: list[str]) -> dict[str, str]:
    """The releases of WATCHED among resolved lines, by name."""
    releases = {name_of(line): line.partition(";")[0].partition("==")[2].strip() for line in lines}
    return {name: releases[name] for name in WATCHED}


def why_untested(releases: dict[str, str], result: dict | None) -> str:
    """Say why the suite "newest" does not show that these releases work.

    Args:
        releases: Release of each watched package.
        result: The note of the suite in matrix.json, or None if it has never run.

    Returns:
        The reason; empty if it shows it.
    """
    if result is None:
        return 'the suite "newest" has never run'
    if result["status"] != 0:
        return f'the suite "newest" failed on {result["date"]}: {result["last line"]}'
    # A build of PyTorch carries its device in the version: 2.15.0+cpu.
    ran = {name: release.partition("+")[0] for name, release in result["versions"].items()}
    others = [
        f"{name} {ran.get(name)}, not {release}" for name, release in releases.items() if ran.get(name) != release
    ]
    return f'the suite "newest" ran with {", ".join(others)}' if others else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parser.add_argument(
        "--python",
        default=project["requires-python"].removeprefix(">="),
        help="the lowest Python; default: %(default)s",
    )
    args = parser.parse_args()
    lines = resolved(args.python)
    releases = watched_releases(lines)
    result = json.loads(MATRIX.read_text()).get("newest") if MATRIX.exists() else None
    reason = why_untested(releases, result)
    if reason:
        sys.exit(f"nothing is written: {reason}. `make everything SUITES=newest` runs it")
    CONSTRAINTS.write_text(HEADER + "".join(f"{line}\n" for line in lines if not belongs_to_torch(line)))
    TESTED.write_text(json.dumps(releases, indent=1) + "\n")
    print("written:", CONSTRAINTS.name, TESTED.relative_to(ROOT), *(f"{name} {one}" for name, one in releases.items()))


if __name__ == "__main__":
    main()
