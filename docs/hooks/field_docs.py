"""Extension of griffe: descriptions of dataclass fields from their help text or comment, and no roles of Sphinx."""

import ast
import dataclasses
import io
import re
import tokenize
from importlib import import_module
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
ROLE = re.compile(r":(?:class|func|meth|mod):`~?([^`]+)`")


class FieldDocs(griffe.Extension):
    """Gives a docstring and a readable default to each dataclass field that has none."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if not any("dataclass" in str(decorator.value) for decorator in cls.decorators):
            return
        for name, text in field_texts(cls).items():
            member = cls.members.get(name)
            if member is not None and not member.docstring:
                member.docstring = griffe.Docstring(text, parent=member)
        for name, default in _defaults(cls).items():
            if name in cls.members and "(" in str(cls.members[name].value):
                cls.members[name].value = default

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Show :func:`name` as `name`, and an example as code: griffe knows the heading Examples only."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)


def field_texts(cls: griffe.Class) -> dict[str, str]:
    """The description of each field of a dataclass, by name, from its `help` or its comment."""
    texts = _comments(cls)
    for field in _fields(cls):
        if field.metadata.get("help"):
            texts[field.name] = sentence(field.metadata["help"])
    return texts


def sentence(text: str) -> str:
    """With a capital at the start and a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "…", ":")) else f"{text}."


def _fields(cls: griffe.Class) -> tuple[dataclasses.Field, ...]:
    kind = getattr(import_module(cls.module.canonical_path), cls.name, None)
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def _defaults(cls: griffe.Class) -> dict[str, str]:
    return {field.name: repr(field.default) for field in _fields(cls) if field.default is not dataclasses.MISSING}


def _comments(cls: griffe.Class) -> dict[str, str]:
    """Comments on the lines of annotated names, by name."""
    lines = cls.source.splitlines()
    width = len(lines[0]) - len(lines[0].lstrip())
    source = "\n".join(line[width:] for line in lines)
    ends = {node.end_lineno: node.target.id for node in ast.parse(source).body[0].body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
    comments = {token.start[0]: token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}  # fmt: skip
    return {name: sentence(comments[line].lstrip("# ")) for line, name in ends.items() if line in comments}
