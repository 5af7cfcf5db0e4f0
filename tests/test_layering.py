"""The order of the rooms: a module imports only modules of lower rank."""

import ast
import functools
import graphlib
import re
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1] / "s2ft"
parse = functools.cache(ast.parse)  # most tests read all files

# The lowest rank is first. Folders and modules of one line do not import each other.
RANKS = [
    ["packages", "foreign", "files"],
    ["config", "distributed"],
    ["codecs", "ops"],
    ["layers"],
    ["model"],
    ["selection"],
    ["adapter"],
    ["attached"],
    ["api"],
    ["estimation", "peft", "export"],
    # ---- so far the library; the guests use it
    ["text"],
    ["conversion", "sync"],
    ["train", "vllm"],
    ["serve", "integrations"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def rank_of(module):
    """The rank of a module such as "attached.hooks", and the matching name in RANKS."""
    name = module
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    return (RANK[name], name) if name else (None, "")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(tree):
    """Modules of s2ft that a module imports by `from s2ft.x import`, `from s2ft import x` or `import s2ft.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            parts = node.module.split(".")
            if parts[0] != "s2ft":
                continue
            inside = ".".join(parts[1:])
            for alias in node.names:
                full = f"{inside}.{alias.name}".lstrip(".")
                if (ROOT / full.replace(".", "/")).exists() or (ROOT / (full.replace(".", "/") + ".py")).exists():
                    yield full
                elif inside:
                    yield inside
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "s2ft" and len(parts) > 1:
                    yield ".".join(parts[1:])


def violations(path, text):
    mine, my_line = rank_of(module_of(path))
    for other in dict.fromkeys(imported(parse(text))):
        rank, line = rank_of(other)
        if rank is None or (line != my_line and rank >= mine):
            yield f"{path.relative_to(ROOT)} imports {other}"


def test_imports_go_down_the_ranks():
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert [found for path in paths for found in violations(path, path.read_text())] == []


def test_every_module_has_a_rank_and_every_rank_a_module():
    modules = {module_of(path) for path in ROOT.rglob("*.py") if list(imported(parse(path.read_text())))}
    modules |= {module_of(path) for path in ROOT.rglob("*.py") if path.name != "__init__.py"}
    modules -= {"__init__"}
    assert [module for module in modules if rank_of(module)[0] is None] == []
    assert [name for name in RANK if not any(rank_of(module)[1] == name for module in modules)] == []


def test_no_import_cycles_inside_a_room():
    """Modules of one folder in RANKS import each other in one direction only."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        me = module_of(path)
        graph[me] = {other for other in imported(parse(path.read_text())) if rank_of(other) == rank_of(me)} - {me}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names a cycle


def test_the_check_of_imports_can_fail():
    text = (
        "from s2ft.attached import saving\nimport s2ft.train.trainer\n"
        "from s2ft import layers\nfrom s2ft.ops import act_mul"
    )
    assert list(imported(parse(text))) == ["attached.saving", "train.trainer", "layers", "ops.act_mul"]
    assert len(list(violations(ROOT / "ops" / "in_place.py", text))) == 3


# ---- attached/ is the only owner of an attached model's state ------------------------------------------

RECORD_FILE = ROOT / "attached" / "record.py"


def test_only_the_record_knows_the_name_of_its_attribute():
    name = re.search(r'^_ATTRIBUTE = "(\w+)"', RECORD_FILE.read_text(), re.MULTILINE)[1]
    assert [path for path in ROOT.rglob("*.py") if re.search(rf"\b{name}\b", path.read_text())] == [RECORD_FILE]


def test_no_script_has_the_name_of_an_installed_package():
    """Python puts the folder of a script first: bench/gpu/kernels.py once took the place of a package."""
    folders = (ROOT.parent / name for name in ("bench", "examples", "release"))
    scripts = {path.stem: path for folder in folders for path in folder.rglob("*.py") if path.stem != "__init__"}
    assert len(scripts) > 30 and not [path for name, path in scripts.items() if name in packages_distributions()]
