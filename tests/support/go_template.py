"""The part of Go's text/template that s2ft writes, for tests without Go."""

import json
import re
import shlex
from typing import Any

ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)


def render(template: str, data: dict[str, Any]) -> str:
    """Render a template. Messages are dicts with Role and Content."""
    parts = ACTION.split(template)  # text and actions in turn
    nodes = [("action" if i % 2 else "text", part.strip() if i % 2 else part) for i, part in enumerate(parts)]
    out: list[str] = []
    end = _run(nodes, 0, data, {"$": data}, out, True)
    assert end == len(nodes)
    return "".join(out)


def _run(nodes, at, dot, variables, out, live):
    """Run nodes up to an `else` or `end` of this level. Returns the place of it."""
    while at < len(nodes):
        kind, text = nodes[at]
        if kind == "text":
            if live:
                out.append(text)
        elif text == "end" or text.startswith("else"):
            return at
        elif text.startswith("if "):
            at = _if(nodes, at, text[3:], dot, variables, out, live)
        elif text.startswith("range "):
            at = _range(nodes, at, text, dot, variables, out, live)
        elif live and (found := re.fullmatch(r"(\$\w+) :?= (.*)", text)):
            variables[found[1]] = _value(found[2], dot, variables)
        elif live:
            out.append(_value(text, dot, variables))
        at += 1
    return at


def _if(nodes, at, condition, dot, variables, out, live):
    true = live and bool(_value(condition, dot, variables))
    at = _run(nodes, at + 1, dot, variables, out, true)
    done = true
    while nodes[at][1] != "end":
        rest = nodes[at][1][len("else") :].strip()
        true = live and not done and (not rest or bool(_value(rest.removeprefix("if "), dot, variables)))
        at = _run(nodes, at + 1, dot, variables, out, true)
        done = done or true
    return at


def _range(nodes, at, text, dot, variables, out, live):
    index, items = re.fullmatch(r"range (\$\w+), \$_ := (\S+)", text).groups()
    end = _run(nodes, at + 1, dot, dict(variables), [], False)
    for number, item in enumerate(_value(items, dot, variables) if live else ()):
        variables[index] = number
        _run(nodes, at + 1, item, variables, out, True)
    return end


def _value(text, dot, variables):
    words = re.findall(r'"(?:[^"\\]|\\.)*"|\(|\)|[^\s()]+', text)
    value, rest = _call(words, dot, variables)
    assert not rest, (text, rest)
    return value


def _call(words, dot, variables):
    """The value of a function with its arguments, or of one word, and the words after it."""
    values = []
    while words and words[0] != ")":
        word, *words = words
        if word == "(":
            value, words = _call(words, dot, variables)
            assert words.pop(0) == ")"
        elif word in FUNCTIONS:
            value = FUNCTIONS[word]
        elif word.startswith('"'):
            value = shlex.split(word)[0]
        elif word.startswith("."):
            value = dot[word[1:]]
        elif word.startswith("$."):
            value = variables["$"][word[2:]]
        elif word.startswith("$"):
            value = variables[word]
        else:
            value = json.loads(word)  # a number, true or false
        values.append(value)
    return (values[0](*values[1:]) if callable(values[0]) else values[0]), words


FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "not": lambda a: not a,
    "and": lambda *all_of: next((value for value in all_of if not value), all_of[-1]),
    "len": len,
    "slice": lambda items, start: items[start:],
}
