"""The references of all ops never wait for a GPU, so that they can be captured in a CUDA graph.

Each case runs on the CPU, where an operator that would wait fails the test, and on a GPU, where PyTorch finds the waits.
"""

import sys

import pytest
import torch
from ops.cases import ALL, DTYPES, OTHER, SMALL, permuted
from support.inside import REFERENCES, _grouped
from support.tolerances import assert_close
from support.waits import no_waits, no_waits_on_gpu

from s2ft import ops

CHECKED = ("scatter_add_", "swap_", "permute_")  # their public functions check the index, which waits on a GPU


def test_every_op_has_a_case():
    defined = {name for name, reference in REFERENCES.items() if reference.__module__.startswith("s2ft.ops.")}
    of_gradients = {name for name in defined if "_grad_" in name or name.endswith("_backward")}
    parts = {"grouped_mm", "grouped_outer"}  # see below
    more = {"indexed_linear"}  # a function of the op sliced_linear
    assert {name.split()[0] for name in SMALL} == defined - of_gradients - parts | more


CASES = [(name, dtype) for name in SMALL for dtype in DTYPES[:3]]


@pytest.mark.parametrize("name, dtype", [*CASES, *((name, torch.float32) for name in OTHER)], ids=str)
def test_no_reference_waits(name, dtype):
    case = ALL[name](dtype=dtype)
    expected = case.results()
    for directly in (False, True):
        assert_close(case.results(within=no_waits(directly)), expected, expected[0].dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_no_op_waits_on_a_gpu_or_in_a_graph(name, dtype):
    """Once as PyTorch registers it, in a graph; the op is called before, as the documentation asks for it."""
    case = ALL[name](dtype=dtype)
    expected = case.results()
    assert_close([one.cpu() for one in case.results(device="cuda")], expected, expected[0].dtype)
    if not name.startswith(CHECKED):
        inputs = [t.detach().cuda().requires_grad_(t.requires_grad) for t in case.tensors]
        with no_waits_on_gpu():
            out = case.run(*inputs)
            if out.requires_grad:
                out.sum().backward()
    inputs = [t.detach().cuda() for t in case.tensors]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = case.run(*inputs)
    graph.replay()
    results = [*([] if out is None else [out]), *inputs[: case.changed]]
    assert_close([one.cpu() for one in results], expected[: len(results)], expected[0].dtype)


@pytest.mark.parametrize(
    "wait",
    (
        lambda t: t.tolist(),
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: int(t.max()),
        lambda t: t.nonzero(),
        lambda t: t.unique(),
        lambda t: t[t > 1],
        lambda t: t.masked_fill_(t > 1, 0)[t > 0],
        lambda t: t.__setitem__(t > 1, torch.arange(2)),
        lambda t: t.cpu(),
        lambda t: torch.bincount(t),
        lambda t: torch.equal(t, t),
    ),
)
def test_the_check_finds_waits(wait):
    with no_waits(), pytest.raises(AssertionError, match="the host waits"):
        wait(torch.arange(4))


def test_the_check_sees_references_in_place_of_compiled_kernels(monkeypatch):
    monkeypatch.setitem(REFERENCES, "act_mul", lambda gate, up, name: gate[gate > 0])
    with no_waits(), pytest.raises(AssertionError, match="the host waits in aten.index"):
        ops.act_mul(torch.ones(2), torch.ones(2), "silu")


@pytest.mark.parametrize("ends", ((0, 0, 0), (5, 5, 5), (0, 0, 300), (1, 2, 300), (130, 130, 290)), ids=str)
def test_blocks_of_rows_equal_the_loop(ends, monkeypatch):
    monkeypatch.setattr(_grouped, "PIECE", 7 * 5 * 2)  # several pieces
    x, grad, weights = (torch.randn(*shape, dtype=torch.float64) for shape in ((300, 7), (300, 5), (3, 7, 5)))
    offsets, used = torch.tensor(ends, dtype=torch.int32), ends[-1]
    x[used:] = float("inf")  # rows of no group must not reach a sum
    ours, theirs = _grouped.product_in_blocks(x, weights, offsets), _grouped.product(x, weights, offsets)
    torch.testing.assert_close(ours[:used], theirs[:used])
    torch.testing.assert_close(_grouped.outer_in_blocks(x, grad, offsets), _grouped.outer(x, grad, offsets))


@pytest.mark.parametrize("shapes", (((0, 4), (2, 4, 3)), ((5, 0), (2, 0, 3)), ((5, 4), (2, 4, 0))), ids=str)
def test_blocks_of_nothing(shapes):
    x, weights = (torch.randn(shape) for shape in shapes)
    offsets = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    torch.testing.assert_close(_grouped.product_in_blocks(x, weights, offsets), x @ weights[1])
    b = torch.randn(x.shape[0], 3)
    torch.testing.assert_close(_grouped.outer_in_blocks(x, b, offsets)[1], x.t() @ b)


def test_permute_in_pieces(monkeypatch):
    monkeypatch.setattr(sys.modules["s2ft.ops.in_place"], "PIECE", 20)
    case = permuted(0, (9, 7))
    assert torch.equal(case.results(within=no_waits())[0], case.results()[0])
