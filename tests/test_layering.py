"""Imports go one way; equal ranks don't import each other."""
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "s2ft"
RANK = {"version": 0, "_build": 1, "coupling": 0, "checkpointing": 0, "compiled": 0, "quantizer": 0, "delta": 0,
        "distributed": 0, "files": 0, "reading": 0, "folder": 1, "ops": 1, "config": 1, "weights": 1,
        "layers": 2, "arch": 3, "permutation": 3, "selection": 3, "fingerprint": 3, "extra": 3,
        "heads": 4, "verify": 4, "mounting": 4,
        "report": 5, "convert": 6, "adapter": 7, "estimate": 7, "train": 8, "peft": 8, "serve": 9, "cli": 10}


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
