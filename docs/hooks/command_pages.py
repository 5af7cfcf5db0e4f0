"""The page of the command line, made from the parsers of the commands."""

import argparse
import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from importlib import import_module

main = import_module("s2ft.cli.main")  # `s2ft.cli` has a function of that name

INTRODUCTION = """# Command line

Every command is a word after `s2ft`; `python -m s2ft` is the same. This page is made from the commands' own parsers.
`s2ft COMMAND --help` prints the same text.

"""


def page() -> str:
    """The page, in Markdown."""
    rows = "\n".join(f"| [`s2ft {name}`](#s2ft-{name}) | {cell(text)} |" for name, text in main.COMMANDS.items())
    table = f"| command | purpose |\n|---|---|\n{rows}\n"
    return INTRODUCTION + table + "".join(section(name, parser_of(name)) for name in main.COMMANDS)


class _Found(Exception):
    """Carries the parser of a command out of the command."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command prints its help with.

    Raises:
        RuntimeError: The command printed no help.
    """

    def found(parser: argparse.ArgumentParser, file: object = None) -> None:
        raise _Found(parser)

    kept, argparse.ArgumentParser.print_help = argparse.ArgumentParser.print_help, found
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            main.main(["--traceback", command, "--help"])
    except _Found as error:
        return error.args[0]
    finally:
        os.environ.pop(main.TRACEBACK, None)  # which `--traceback` has set for this process
        argparse.ArgumentParser.print_help = kept
    raise RuntimeError(f"s2ft {command} --help printed no help of a parser")


def section(command: str, parser: argparse.ArgumentParser) -> str:
    """The part of the page about one command."""
    parts = [f"\n## s2ft {command}\n"]
    if parser.description:
        parts.append(f"{paragraphs(parser.description)}\n")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if shown(action)]
        if actions:
            title = group.title if group.title not in (None, "positional arguments", "options") else None
            heading = f"### {title[:1].upper()}{title[1:]} {{ #{command}-{slug(title)} }}\n" if title else ""
            table = ["", "| option | default | meaning |", "|---|---|---|", *(row(one, parser) for one in actions)]
            parts.append(heading + "\n".join(table) + "\n")
    if parser.epilog:
        parts.append(f"```text\n{parser.epilog.strip()}\n```\n")
    return "\n".join(parts)


def shown(action: argparse.Action) -> bool:
    """Whether an option is one to show."""
    return action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def row(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """One line of a table of options."""
    value_by_default = getattr(parser, "defaults", {}).get(action.dest, action.default)
    names = [name for name in action.option_strings if "_" not in name] or action.option_strings
    value = metavar(action)
    name = "`, `".join(f"{name} {value}".strip() for name in names) if names else value
    text = (action.help or "") % {"default": action.default, "prog": "s2ft", "type": ""}
    nothing = (None, "", argparse.SUPPRESS, [])
    default = "" if value_by_default in nothing else f"`{value_by_default}`"
    if isinstance(value_by_default, bool):
        default = "on" if value_by_default and action.const is not False else "off"
    if action.required or value_by_default is dataclasses.MISSING:
        default = "required"
    elif stated := re.search(r" \(default: (.*)\)$", text):
        text, default = text[: stated.start()], stated[1]
    if action.choices is not None and not all(str(choice) in text for choice in action.choices):
        text += f"; one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    return f"| `{cell(name)}` | {cell(default)} | {cell(text)} |"


def metavar(action: argparse.Action) -> str:
    """What stands for the value of an option."""
    if action.nargs == 0 or action.const is True or isinstance(action, argparse.BooleanOptionalAction):
        return ""
    word = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    word = " ".join(word) if isinstance(word, tuple) else str(word)
    return f"{word} ..." if action.nargs in ("+", "*") else word


def cell(text: str) -> str:
    """Text that can stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def paragraphs(text: str) -> str:
    """Text as it stands, where it has columns; else as Markdown."""
    return "\n\n".join(f"```text\n{part}\n```" if "\n" in part and "  " in part else part
                       for part in text.strip().split("\n\n"))  # fmt: skip


def slug(title: str) -> str:
    return "-".join(_words(title.lower()))


def _words(text: str) -> Iterator[str]:
    for word in text.split():
        kept = "".join(character for character in word if character.isalnum())
        if kept:
            yield kept
