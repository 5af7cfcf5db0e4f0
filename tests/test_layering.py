"""The order of the rooms: a module imports only what stands before it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "s2ft"

# From the ground up. A line is a module or a folder; what stands on one line does not import each other. A folder
# whose modules stand on several lines is listed by module. A module has the rank of the longest name that matches.
RANKS = [
    ["packages", "distributed", "files.writing", "files.reading", "model.coupling", "model.delta", "ops._cuda"],
    ["files.adapter_folder", "ops._build", "config", "attached.hosts.compiled", "attached.hosts.checkpointing"],
    ["ops._lock", "ops._memory"],
    ["ops._effective", "ops._library"],
    ["ops._linear", "attached.hosts.quantizers"],
    ["ops"],
    ["layers.kind"],
    ["layers.base"],
    ["layers"],
    ["model.weights"],
    ["model.builders", "model.custom", "model.permutation", "model.fingerprint"],
    ["model.families"],
    ["model.registry", "model.verify"],
    ["selection"],
    ["attached"],
    ["api"],
    ["adapter"],
    ["estimation", "text"],
    ["train", "peft", "export"],
    ["serve"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def rank_of(module):
    """The rank of a module such as "attached.hosts.compiled", and the name in RANKS that it has it from."""
    name = module
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    return (RANK[name], name) if name else (None, "")


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(tree):
    """Modules of s2ft that a module imports, as `from s2ft.x import`, `from s2ft import x`, `import s2ft.x`."""
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
    for other in dict.fromkeys(imported(ast.parse(text))):
        rank, line = rank_of(other)
        if rank is None or (line != my_line and rank >= mine):
            yield f"{path.relative_to(ROOT)} imports {other}"


def test_imports_go_down_the_ranks():
    paths = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert [found for path in paths for found in violations(path, path.read_text())] == []


def test_every_module_has_a_rank_and_every_rank_a_module():
    modules = {module_of(path) for path in ROOT.rglob("*.py") if list(imported(ast.parse(path.read_text())))}
    modules |= {module_of(path) for path in ROOT.rglob("*.py") if path.name != "__init__.py"}
    modules -= {"__init__"}
    assert [module for module in modules if rank_of(module)[0] is None] == []
    assert [name for name in RANK if not any(rank_of(module)[1] == name for module in modules)] == []


def test_no_circles_inside_a_room():
    """Modules of one line of RANKS import each other in one direction only."""
    graph = {}
    for path in ROOT.rglob("*.py"):
        me = module_of(path)
        graph[me] = {other for other in imported(ast.parse(path.read_text())) if rank_of(other) == rank_of(me)} - {me}
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " imports ".join([*under_way[under_way.index(module) :], module])
        if module not in done:
            under_way.append(module)
            for other in graph.get(module, ()):
                visit(other)
            done.add(under_way.pop())

    for module in graph:
        if module != "__init__":
            visit(module)


def test_the_check_can_fail():
    text = "from s2ft.adapter import store\nimport s2ft.train.trainer\nfrom s2ft import layers\nfrom s2ft.ops import act_mul\n"
    assert list(imported(ast.parse(text))) == ["adapter.store", "train.trainer", "layers", "ops.act_mul"]
    assert len(list(violations(ROOT / "layers" / "base.py", text))) == 3
