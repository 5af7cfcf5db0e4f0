"""The messages on the troubleshooting page are messages of s2ft."""

import ast
import re

from .blocks import ROOT


def quoted(page):
    """The messages of a page: the code at the start of each table row. "…" stands for any text."""
    for cell in re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE):
        yield from re.findall(r"`([^`]+)`", cell)


def texts():
    """Every string in the source of s2ft. The values of a formatted string are left out."""
    for path in (ROOT / "s2ft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "\0".join(part.value for part in node.values if isinstance(part, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def missing(page):
    found = list(texts())
    parts = {message: [part.strip() for part in message.split("…")] for message in quoted(page)}
    return [message for message in parts if not any(all(p in text for p in parts[message]) for text in found)]


def test_every_message_is_one_of_s2ft():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(list(quoted(page))) > 30 and missing(page) == []


def test_the_check_can_fail():
    assert missing("| `there is no adapter called … already` | a | b |\n| `no such message` | a | b |") == [
        "there is no adapter called … already",
        "no such message",
    ]
