"""Imports go one way; equal ranks don't import each other."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "s2ft"
RANK = {
    "version": 0,
    "_cuda": 0,
    "coupling": 0,
    "checkpointing": 0,
    "compiled": 0,
    "quantizer": 0,
    "delta": 0,
    "distributed": 0,
    "files": 0,
    "packages": 0,
    "reading": 0,
    "_build": 1,
    "folder": 1,
    "config": 1,
    "weights": 1,
    "ops": 2,
    "layers": 3,
    "arch": 4,
    "permutation": 4,
    "selection": 4,
    "fingerprint": 4,
    "extra": 4,
    "heads": 5,
    "verify": 5,
    "record": 5,
    "states": 6,
    "mounting": 7,
    "active": 8,
    "report": 8,
    "convert": 9,
    "adapter": 10,
    "estimate": 10,
    "train": 11,
    "peft": 11,
    "serve": 12,
    "cli": 13,
    "__main__": 14,
}


def unit_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_units(tree):
    """Units of s2ft that a module imports, as `from s2ft.x import`, `from s2ft import x`, `import s2ft.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            parts = node.module.split(".")
            if parts[0] == "s2ft":
                yield from parts[1:2] or [alias.name for alias in node.names if alias.name in RANK]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "s2ft":
                    yield from parts[1:2]


def violations():
    for path in ROOT.rglob("*.py"):
        if path == ROOT / "__init__.py":
            continue
        me = unit_of(path)
        for other in imported_units(ast.parse(path.read_text())):
            if other != me and RANK[other] >= RANK[me]:
                yield f"{path.relative_to(ROOT)} imports {other}"


def test_imports_go_down_the_ranks():
    assert list(violations()) == []


def test_every_module_has_a_rank():
    assert {unit_of(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(RANK)


def test_the_check_can_fail():
    tree = ast.parse("from s2ft.adapter import x\nimport s2ft.train.data\nfrom s2ft import layers")
    assert list(imported_units(tree)) == ["adapter", "train", "layers"]
