"""Finds the code blocks of README.md and docs/ and runs them, a page at a time and in order.

A Python block runs in the namespace of its page; lines that start with ``>>>`` must print the output below them. The
lines of a bash block are commands: ``s2ft ...`` runs in this process, any other command in a shell. A line that ends
with ``&`` is a server: it runs until the page ends. A block that can't run here has a comment with the reason before it::

    <!--- skip: next "needs two GPUs" -->

If the reason is ``needs PACKAGE``, the block runs where that Python package is installed.
"""

import doctest
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

from support.sources import ROOT
from sybil import Document, Example
from sybil.evaluators.skip import Skipper
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from .shell import Shell

RUN = ("python", "bash")
SHOWN = ("bibtex", "c", "cpp", "csv", "diff", "json", "jsonl", "text", "toml", "yaml")  # languages that are not run
PACKAGE = re.compile(r'<!---? *skip: next "needs (\w+)" *-+>')
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def pages() -> list[Path]:
    """README.md and the pages of docs/, in order of their paths."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parse(page: Path, shell: Shell | None = None) -> Document:
    """Parse a page. The examples of the document can be evaluated if `shell` is given."""
    shell = shell or Shell(ROOT, 0)
    text = PACKAGE.sub(lambda found: "" if find_spec(found[1]) else found[0], page.read_text(encoding="utf-8"))
    document = Document(shell.with_port(text), str(page))
    for parser in (PythonCodeBlockParser(doctest_optionflags=FLAGS), CodeBlockParser("bash", shell), SkipParser()):
        for region in parser(document):
            document.add(region)
    return document


def reasons(page: Path) -> Iterator[str | None]:
    """The reason why a block of the page is not run, for each block; None if it is run.

    Raises:
        ValueError: A block is left out and no reason is written.
    """
    reason = None
    for example in parse(page):
        if not isinstance(example.region.evaluator, Skipper):
            yield reason
            reason = None
            continue
        _, reason = example.parsed
        if not reason:
            name = page.relative_to(ROOT)
            raise ValueError(f'{name}, line {example.line}: write the reason, <!--- skip: next "reason" -->')


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
