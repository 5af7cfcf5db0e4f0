"""The page "What ran where", made from the results that release/suites.py notes."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "release"))

from suites import MATRIX, SUITES

STALE = 30  # days
REASONS = 8  # of skips that are named

INTRODUCTION = """# What ran where

`make everything` runs every suite, each in the environment that it needs, and notes what came out; `SUITES="vllm peft"`
names some. This page is made from these notes. A suite that is older than {days} days, or has never run, is *stale*.
The outputs are in `build/suites`.

| suite | shows | passed, failed | skipped | ran |
|---|---|---|---|---|
"""


def page(matrix: Path = MATRIX, today: datetime.date | None = None) -> str:
    """The page, in Markdown."""
    today = today or datetime.date.today()
    results = json.loads(matrix.read_text()) if matrix.exists() else {}
    text = INTRODUCTION.format(days=STALE) + "".join(line(name, results.get(name), today) for name in SUITES)
    for name in SUITES:
        if name in results:
            text += details(name, results[name])
    installs = matrix.with_name("installs.md")
    return text + (f"\n## What pip installs\n\n{installs.read_text()}" if installs.exists() else "")


def line(name: str, result: dict[str, Any] | None, today: datetime.date) -> str:
    """One line of the table."""
    if result is None:
        return f"| `{name}` | {SUITES[name].shows} | | | never: *stale* |\n"
    age = (today - datetime.date.fromisoformat(result["date"])).days
    outcome = f"{result['passed']:,}, {result['failed']:,}" + ("" if result["status"] == 0 else ": **red**")
    when = f"{result['date']} at {result['commit']}, {result['seconds']:,} s" + (", *stale*" if age > STALE else "")
    return f"| `{name}` | {SUITES[name].shows} | {outcome} | {sum(result.get('skipped', {}).values()):,} | {when} |\n"


def details(name: str, result: dict[str, Any]) -> str:
    """What was skipped and what failed, and where it ran."""
    found = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    text = f"\n## {name}\n\n{result['processor']}, Python {result['python']}; {found}\n"
    if result["last line"]:
        text += f"\nThe last line: `{result['last line'].replace('`', '')}`\n"
    reasons = list(result.get("skipped", {}).items())
    others = sum(count for _, count in reasons[REASONS:])
    for reason, count in reasons[:REASONS]:
        text += f"\n- {count:,} skipped: `{' '.join(reason.split()).replace('`', '')}`"
    text += f"\n- {others:,} skipped for other reasons" if others else ""
    for failure in result.get("failures", ()):
        text += f"\n- failed: `{failure}`"
    return text + "\n"


if __name__ == "__main__":
    # `python docs/hooks/suite_page.py NAME` prints the note of one suite, for the summary of a workflow.
    results = json.loads(MATRIX.read_text()) if MATRIX.exists() else {}
    print(line(sys.argv[1], results.get(sys.argv[1]), datetime.date.today()))
    if sys.argv[1] in results:
        print(details(sys.argv[1], results[sys.argv[1]]))
