"""What pip installs beside s2ft, in an empty environment: python release/resolve.py [--python PYTHON] [NAME ...]

For each line of COMBINATIONS pip resolves the requirements of s2ft and the packages beside it, and installs nothing.
The table is in bench/results/installs.md, which the page "What ran where" shows. A name runs the lines that have it.
The status is 1 if a line that must resolve did not. It needs Python 3.11.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from environments import ROOT, environment

TABLE = ROOT / "bench" / "results" / "installs.md"
MINUTES = 15
LONGEST = 160  # characters of a reason
SHOWN = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm")
COMBINATIONS = (  # extras of s2ft, packages beside it, whether they must resolve
    ("", (), True),
    ("train", (), True),
    ("all", (), True),
    ("peft", ("transformers==5.0.0", "torch==2.11.0"), True),
    ("train", ("vllm>=0.32",), True),
    ("train", ("sentence-transformers>=6.2",), True),
    ("train", ("lm-eval",), True),
    ("", ("trl[vllm]>=1.16",), True),
    ("", ("unsloth>=2026.10",), True),
    ("", ("axolotl>=0.19",), True),
    ("", ("ms-swift>=3",), True),
    ("", ("llamafactory>=0.9",), True),
    ("vllm", ("trl[vllm]>=1.16",), False),
    ("train", ("unsloth>=2026.10",), False),
    ("train", ("axolotl>=0.19",), False),
    ("train", ("ms-swift>=3",), False),
    ("train", ("llamafactory>=0.9",), False),
)


def requirements(extras: str) -> list[str]:
    """The requirements of s2ft with some extras, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        for one in project["optional-dependencies"][extra]:
            nested = one.startswith("s2ft[")
            found += requirements(one.removeprefix("s2ft[").rstrip("]")) if nested else [one]
    return list(dict.fromkeys(found))


def resolve(python: Path, wanted: list[str]) -> tuple[bool, str]:
    """Let pip resolve requirements. Returns whether it did, and the versions that it chose or its reason."""
    report = python.parents[1] / "report.json"
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report]
    try:
        done = subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return False, f"pip finds nothing within {MINUTES} minutes"
    if done.returncode:
        lines = [line.strip().removeprefix("ERROR: ") for line in done.stderr.splitlines()]
        reasons = [line for line in lines if line.startswith("Cannot install")] or [line for line in lines if line][-1:]
        return False, "".join(line[:LONGEST] + " …" for line in reasons)
    chosen = {one["metadata"]["name"].lower(): one["metadata"] for one in json.loads(report.read_text())["install"]}
    names = dict.fromkeys([*(name_of(one) for one in wanted), *SHOWN])
    return True, ", ".join(f"{name} {chosen[name]['version']}" for name in names if name in chosen)


def name_of(requirement: str) -> str:
    """The package of a requirement such as "trl[vllm]>=1.16,<2" or "numpy<3"."""
    return re.match(r"[\w.-]+", requirement)[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter of the environment")
    args = parser.parse_args()
    python, wrong = environment("resolve", ("pip>=25",), args.python), 0
    version = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
    lines = [f"pip in an empty environment, {version}, {time.strftime('%Y-%m-%d')}.\n"]
    lines += ["| s2ft | beside it | | what pip chooses, or why it can't |", "|---|---|---|---|"]
    earlier = TABLE.read_text().splitlines() if TABLE.exists() else []
    for extras, beside, must in COMBINATIONS:
        name = f"s2ft[{extras}]" if extras else "s2ft"
        start = f"| `{name}` | {', '.join(f'`{one}`' for one in beside)} | "
        if args.names and not any(word in start for word in args.names):
            lines += [line for line in earlier if line.startswith(start)]
            continue
        done, found = resolve(python, [*requirements(extras), *beside])
        wrong += must and not done
        lines.append(f"{start}{'yes' if done else 'no'} | {found} |")
        print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
