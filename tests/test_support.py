"""Tests of the helpers that other tests use."""

import ast
from multiprocessing import get_context
from pathlib import Path

# This runs in a separate process, because products stay divided.
DIVIDED = """
import torch
from support.rounding import divide_products
torch.set_num_threads(1)
torch.manual_seed(0)
a, b, c = torch.randn(64, 48), torch.randn(48, 32), torch.randn(64, 32)

def products(b):
    yield a @ b
    yield a @ b[:, 0]
    yield a[0] @ b[:, 0]
    yield torch.bmm(a[None], b[None])
    yield torch.addmm(c, a, b, beta=2, alpha=3)
    yield torch.addmv(c[:, 0], a, b[:, 0], beta=2, alpha=3)
    yield torch.baddbmm(c[None], a[None], b[None], beta=2, alpha=3)
    yield torch.addmm(c, a, b, beta=2, out=torch.empty(0))
    yield c.clone().addmm_(a, b, alpha=3)

whole = list(products(b))
library = divide_products("1")
first, again, other = list(products(b)), list(products(b)), list(products(b.t().contiguous().t()))
for i, (one, two) in enumerate(zip(first, whole)):
    torch.testing.assert_close(one, two, msg=f"product {i}")
assert all(map(torch.equal, first, again))
assert sum(map(torch.equal, first, other)) <= 1   # a single number may round to the same
assert torch.equal(torch.eye(9) @ torch.full((9, 5), 0.1), torch.full((9, 5), 0.1))   # nothing to round
assert torch.equal(torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 4, dtype=torch.int64), torch.full((2, 4), 3))
"""


def test_products_that_round_by_layout():
    process = get_context("fork").Process(target=exec, args=(DIVIDED, {}))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_tests_reach_internals_through_support_inside_alone():
    """So that what moves in s2ft changes one line, and no test."""
    public = {"s2ft", "s2ft.ops", "s2ft.peft", "s2ft.vllm", "s2ft.cli.main"}
    tests, found = Path(__file__).parent, []
    for path in tests.rglob("*.py"):
        if "golden" not in path.parts and path.parent.name != "upstream" and path.name != "typing_use.py":
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            found += [
                f"{path.name}: {n.module}"
                for n in nodes
                if f"{n.module}.".startswith("s2ft.") and n.module not in public
            ]
    assert found == []
