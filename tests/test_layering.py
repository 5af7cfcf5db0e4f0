"""The order of the rooms: a module imports only modules of lower rank."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1] / "s2ft"
parse = functools.cache(ast.parse)  # most tests read all files

# The lowest rank is first. A line lists modules and folders of one rank, which do not import each other. A folder
# whose modules have several ranks is listed by module. A module has the rank of the longest name that matches it.
RANKS = [
    ["ranks"],
    [
        "packages",
        "distributed",
        "files.tables",
        "files.writing",
        "files.reading",
        "files.yaml_reading",
        "model.coupling",
        "model.delta",
        "ops._cuda",
    ],
    ["model.discovery.tiny_config", "attached.hosts.sentence_transformers"],
    ["files.adapter_folder", "ops._build", "config", "attached.hosts.compiled", "attached.hosts.checkpointing"],
    ["files.streaming", "model.conversion", "model.gathering", "model.modes", "model.outputs", "model.towers"],
    ["files.formats", "ops._lock", "ops._memory", "model.checkpoint"],
    ["ops._effective", "ops._library"],
    ["ops._linear", "ops._grouped", "attached.hosts.quantizers"],
    ["ops"],
    ["ops._one_input"],
    ["layers.split"],
    ["layers.kind", "layers.held"],
    ["layers.base"],
    ["layers"],
    ["model.weights"],
    ["model.builders", "model.custom", "model.permutation", "model.fingerprint"],
    ["model.families", "model.location", "model.discovery.examples", "model.discovery.twin"],
    ["model.discovery"],
    ["model.registry"],
    ["selection"],
    ["attached"],
    ["adapter"],
    ["api"],
    ["estimation", "text"],
    ["peft", "export"],
    ["sync"],
    ["train", "vllm"],
    ["serve", "integrations"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


def rank_of(module):
    """The rank of a module such as "attached.hosts.compiled", and the matching name in RANKS."""
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


def test_the_check_of_imports_can_fail():
    text = (
        "from s2ft.adapter import saving\nimport s2ft.train.trainer\n"
        "from s2ft import layers\nfrom s2ft.ops import act_mul"
    )
    assert list(imported(parse(text))) == ["adapter.saving", "train.trainer", "layers", "ops.act_mul"]
    assert len(list(violations(ROOT / "ops" / "swap_.py", text))) == 3


# ---- attached/ is the only owner of an attached model's state ------------------------------------------

RECORD_FILE = ROOT / "attached" / "record.py"
GIVES_A_RECORD = ("Attachment", "attachment_of", "find_attachment", "new_attachment")
VIEWS = ("values", "items", "keys", "get")  # methods that give a part of the record, not a new object
MUTATING = {
    *("append", "extend", "insert", "remove", "pop", "clear", "sort", "reverse"),
    *("update", "setdefault", "popitem", "add", "discard", "apply", "__setitem__", "__setattr__"),
}


def root_of(node):
    """The name that a chain of attributes, items and views such as `record.mounts.values()` begins with, or a call."""
    while True:
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in VIEWS:
            node = node.func.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("next", "iter", "reversed"):
            node = node.args[0]
        else:
            break
    called = node.func if isinstance(node, ast.Call) else node
    return getattr(called, "id", getattr(called, "attr", None))


def bound_to_records(function):
    """Names in a function that hold a model's record or a part of it."""
    names, known = set(GIVES_A_RECORD), 0
    for argument in ast.walk(function):
        if isinstance(argument, ast.arg) and argument.annotation is not None:
            if any(getattr(part, "id", None) == "Attachment" for part in ast.walk(argument.annotation)):
                names.add(argument.arg)
    while known != len(names):
        known = len(names)
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.NamedExpr, ast.For, ast.comprehension, ast.AnnAssign)):
                value = node.value if hasattr(node, "value") else node.iter
                options = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
                options = [part for one in options for part in (one.values if isinstance(one, ast.BoolOp) else [one])]
                if any(root_of(option) in names for option in options):
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def changes_of_records(text):
    """Lines that assign a field of a record, or of an object in it, or call a method that changes one in place.

    It follows a record through the names of one function: from an annotation or a function that returns a record,
    through attributes, items, loops and `or`. Other modules call methods of the record to change it.
    """
    tree = parse(text)
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.Lambda)):
            continue
        names = bound_to_records(function)
        for node in ast.walk(function):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)):
                flat = [part for target in targets for part in getattr(target, "elts", [target])]
                if any(isinstance(part, (ast.Attribute, ast.Subscript)) and root_of(part) in names for part in flat):
                    yield node.lineno
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING:
                if isinstance(node.func.value, (ast.Attribute, ast.Subscript)) and root_of(node.func.value) in names:
                    yield node.lineno
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
                if root_of(node.args[0]) in names:
                    yield node.lineno


def outside_attached():
    return [path for path in ROOT.rglob("*.py") if "attached" not in path.relative_to(ROOT).parts]


def test_only_attached_changes_a_record():
    found = [(path.name, line) for path in outside_attached() for line in changes_of_records(path.read_text())]
    assert found == []


def test_the_check_of_changes_can_fail():
    changing = (
        "record.active = {}",
        "record.extra.base['a'] = 1",
        "record.written.append(1)",
        "record.name, other = None, 1",
        "del record.loaded['a']",
        "setattr(record, 'name', 'a')",
        "record.active |= {}",
        "for mount in record.mounts.values():\n        mount.parts.clear()",
        "for path, (mount, part) in record.parts.items():\n        part.positions = None",
        "mount = next(iter(record.mounts.values()))\n    mount.original = None",
    )
    reading = (
        "active = dict(record.active)\n    active.clear()",
        "record.load(adapter)",
        "weights = {}\n    weights['a'] = 1",
    )
    for line in (*changing, *reading):
        for start in ("def f(record: Attachment | None):", "def f(model):\n    record = find_attachment(model) or g()"):
            found = set(changes_of_records(f"{start}\n    {line}"))
            assert bool(found) == (line in changing), line


def names_the_attribute(text, name):
    """Whether a module reads or writes the attribute `name`, or contains it as a string."""
    return any(
        getattr(node, "attr", None) == name or (isinstance(node, ast.Constant) and node.value == name)
        for node in ast.walk(parse(text))
    )


def test_only_the_record_knows_the_name_of_its_attribute():
    (name,) = (
        node.value.value
        for node in parse(RECORD_FILE.read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "_ATTRIBUTE"
    )
    knowing = [path for path in ROOT.rglob("*.py") if names_the_attribute(path.read_text(), name)]
    assert knowing == [RECORD_FILE]
    assert names_the_attribute(f"model.{name} = 1", name) and names_the_attribute(f"f({name!r})", name)
    assert not names_the_attribute("model.s2ft = 's2ft'", name)


# ---- size ----------------------------------------------------------------------------------------------

LONGEST = 52  # lines of a function without its docstring: one screen


def body_lines(function):
    """Lines of a function, from def to its end, without its docstring."""
    first = function.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    docstring = first.end_lineno - first.lineno + 1 if is_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def too_long(text):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [n.name for n in ast.walk(parse(text)) if isinstance(n, functions) and body_lines(n) > LONGEST]


def test_functions_fit_on_a_screen():
    assert {str(path): names for path in ROOT.rglob("*.py") if (names := too_long(path.read_text()))} == {}
    assert too_long("def f():\n    '''Text.'''\n" + "    x = 1\n" * LONGEST) == ["f"]


def test_the_root_holds_at_most_seven_files():
    """Other files belong in a room. Files that the build writes are not counted."""
    built = [*ROOT.glob("_C.*"), ROOT / "_build.json"]
    assert len([path for path in ROOT.iterdir() if path.is_file() and path not in built]) <= 7
