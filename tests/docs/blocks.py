"""Finds the code blocks of README.md and docs/ and runs them, a page at a time and in order.

A Python block runs in the namespace of its page; lines that start with ``>>>`` must print the output below them. The
lines of a bash block are commands: ``s2ft ...`` runs in this process, any other command in a shell. A line that ends
with ``&`` is a server: it runs until the page ends. A block that can't run here has a comment with the reason before it::

    <!--- skip: next "needs two GPUs" -->

If the reason is ``needs PACKAGE``, the block runs where that Python package is installed.
"""

import ast
import doctest
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

from sybil import Document, Example
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import FENCE

from .shell import Shell

ROOT = Path(__file__).parents[2]
RUN = ("python", "bash")
SHOWN = ("bibtex", "c", "cpp", "csv", "diff", "json", "jsonl", "text", "toml", "yaml")  # languages that are not run
PACKAGE = re.compile(r'<!---? *skip: next "needs (\w+)" *-+>')
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A block of code on a page."""

    page: str  # path from the root of the repository
    line: int
    language: str
    reason: str | None  # the reason why it is not run; None if it is run


def pages() -> list[Path]:
    """README.md and the pages of docs/, in order of their paths."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parse(page: Path, shell: Shell | None = None) -> Document:
    """Parse a page. The examples of the document can be evaluated if `shell` is given."""
    shell = shell or Shell(ROOT, 0)
    text = PACKAGE.sub(lambda found: "" if find_spec(found[1]) else found[0], page.read_text(encoding="utf-8"))
    document = Document(shell.with_port(text), str(page))
    parsers = (PythonCodeBlockParser(doctest_optionflags=FLAGS), CodeBlockParser("bash", shell), SkipParser())
    for parser in parsers:
        for region in parser(document):
            document.add(region)
    return document


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page that are run or left out with a reason.

    Raises:
        ValueError: A block is left out and no reason is written.
    """
    name, reason, left_out = str(page.relative_to(ROOT)), None, ""
    for example in parse(page):
        if isinstance(example.region.evaluator, Skipper):
            left_out, reason = example.parsed
            reason = ast.literal_eval(reason.strip()) if reason else None
            if left_out != "end" and not reason:
                raise ValueError(f'{name}, line {example.line}: write the reason, <!--- skip: next "reason" -->')
            continue
        language = "bash" if isinstance(example.region.evaluator, Shell) else "python"
        yield Block(name, example.line, language, reason if left_out in ("next", "start") else None)
        if left_out == "next":
            left_out = ""


def fences(page: Path) -> Iterator[tuple[int, str]]:
    """Line and language of every fenced block of a page, found without the parsers above."""
    text, closing = page.read_text(encoding="utf-8"), None
    for found in FENCE.finditer(text):
        if closing is None:
            closing = found["fence"]
            words = found["trailing"].split()
            yield text.count("\n", 0, found.start()) + 1, words[0] if words else ""
        elif not found["trailing"].strip() and found["fence"].startswith(closing):
            closing = None


def run(page: Path, shell: Shell) -> int:
    """Run the blocks of a page in the working directory. Returns how many ran."""
    return sum(_evaluate(example) for example in parse(page, shell))


def _evaluate(example: Example) -> bool:
    """Whether the example is a block that ran."""
    try:
        example.evaluate()
    except SkipTest:
        return False
    return not isinstance(example.region.evaluator, Skipper)
