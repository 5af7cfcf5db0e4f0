"""The references of all ops never wait for a GPU, so that they can be captured in a CUDA graph.

Each case runs on the CPU, where an operator that would wait fails the test, and on a GPU, where PyTorch finds the waits.
"""

import sys
from functools import partial

import pytest
import torch
from support.tolerances import GEMM
from support.waits import no_waits

from s2ft import ops
from s2ft.ops import _grouped
from s2ft.ops._library import REFERENCES
from s2ft.ops.act_mul import ACTIVATIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ENDS = (3, 3, 20, 57)  # rows of four groups: a few, none, more than a block, several blocks with a remainder


class Case:
    """An op with its arguments.

    Attributes:
        run: Calls the op with the tensors.
        tensors: The arguments that are tensors.
        changed: How many of the first tensors the op changes in place.
    """

    def __init__(self, run, *tensors, changed=0):
        self.run, self.tensors, self.changed = run, tensors, changed

    def results(self, device="cpu"):
        """Call the op on fresh copies. Returns its results, the changed tensors and all gradients."""
        inputs = [t.detach().to(device, copy=True).requires_grad_(t.requires_grad) for t in self.tensors]
        out = self.run(*inputs)
        out = () if out is None else (out,) if isinstance(out, torch.Tensor) else tuple(out)
        wanted = [t for t in inputs if t.requires_grad]
        grads = torch.autograd.grad(out[0], wanted, torch.ones_like(out[0])) if wanted else ()
        return [t.detach() for t in (*out, *inputs[: self.changed], *grads)]


def trained(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).requires_grad_()


def linear(dim, index, dtype=torch.float32):
    """sliced_linear, or indexed_linear with an index."""
    x, weight = trained(5, 12, dtype=dtype), torch.randn(10, 12).to(dtype)
    delta = trained(3, 12) if dim == 0 else trained(10, 3)
    if index:
        units = torch.tensor([7, 0, 4])
        return Case(lambda x, w, d, u: ops.indexed_linear(x, w, d, u, dim), x, weight, delta, units)
    return Case(lambda x, w, d: ops.sliced_linear(x, w, d, 4, dim), x, weight, delta)


def experts(dim, dtype, columns=16):
    """grouped_linear; with 13 columns no operand is aligned."""
    groups, outputs = len(ENDS), 24
    x, weight = trained(ENDS[-1], columns, dtype=dtype), torch.randn(groups, outputs, columns).to(dtype)
    size = (outputs, columns)[dim]
    index = torch.tensor([1, 5, size + 2, 3 * size, 3 * size + 7])
    delta = trained(5, columns) if dim == 0 else trained(outputs, 5)

    def run(x, weight, delta, index, offsets):
        return ops.grouped_linear(x, weight, delta, index, offsets, dim, most=2)

    return Case(run, x, weight, delta, index, torch.tensor(ENDS, dtype=torch.int32))


def convolution(dim):
    x, weight = trained(2, 6, 9), torch.randn(8, 6, 3)
    delta, index = trained(2, 6, 3) if dim == 0 else trained(8, 2, 3), torch.tensor([5, 1])
    return Case(lambda x, w, d, i: ops.indexed_conv(x, w, d, i, dim, padding=[1]), x, weight, delta, index)


def bank(dim):
    inputs, outputs = 10, 14
    sizes = (3, 0, 5)
    deltas = [
        (torch.randperm((outputs, inputs)[dim])[:n], torch.randn((n, inputs) if dim == 0 else (outputs, n)))
        for n in sizes
    ]
    packed = ops.pack_adapters(deltas, dim)
    x, y, adapter = trained(4, 2, inputs), trained(4, 2, outputs), torch.tensor([2, -1, 0, 1])
    return Case(lambda *tensors: ops.multi_adapter_linear(*tensors, dim), x, y, *packed, adapter)


def scattered(dim, several):
    index = torch.tensor([4, 1, 7]), torch.tensor([1, 9])
    deltas = [torch.randn([(n, 10), (10, n)][dim]) for n in (3, 2)]

    def run(weight, kept, first, second, *delta):
        if several:
            other = torch.zeros_like(delta[1]).to(weight.dtype)
            return ops.scatter_add_(weight, [first, second], delta, dim, [0.5, 2.0], [kept, other])
        return ops.scatter_add_(weight, first, delta[0], dim, 0.5, kept)

    return Case(run, torch.randn(10, 10).bfloat16(), torch.zeros_like(deltas[0]).bfloat16(), *index, *deltas, changed=2)


def swapped(dim):
    values = torch.randn([(3, 10), (10, 3)][dim])
    return Case(
        lambda w, v, i: ops.swap_(w, i, v, dim), torch.randn(10, 10), values, torch.tensor([4, 1, 7]), changed=2
    )


def permuted(dim, shape):
    order = torch.randperm(shape[dim])
    return Case(lambda w, o: ops.permute_(w, o, dim), torch.randn(shape), order, changed=1)


CASES = {
    **{f"act_mul {name}": partial(lambda n: Case(lambda g, u: ops.act_mul(g, u, n), trained(7, 9), trained(7, 9)), name)
       for name in ACTIVATIONS},
    **{f"{'indexed' if index else 'sliced'}_linear dim {dim} {dtype}": partial(linear, dim, index, dtype)
       for dim in (0, 1) for index in (True, False) for dtype in DTYPES},
    **{f"grouped_linear dim {dim} {dtype} {columns}": partial(experts, dim, dtype, columns)
       for dim in (0, 1) for dtype in DTYPES for columns in (16, 13)},
    **{f"indexed_conv dim {dim}": partial(convolution, dim) for dim in (0, 1)},
    **{f"multi_adapter_linear dim {dim}": partial(bank, dim) for dim in (0, 1)},
    **{f"scatter_add_ dim {dim} {several}": partial(scattered, dim, several) for dim in (0, 1) for several in (0, 1)},
    **{f"swap_ dim {dim}": partial(swapped, dim) for dim in (0, 1)},
    **{f"permute_ {dim} {shape}": partial(permuted, dim, shape)
       for dim, shape in ((0, (9,)), (0, (9, 4)), (1, (4, 9)), (1, (3, 5, 2)))},
}  # fmt: skip
CHECKED = ("scatter_add_", "swap_", "permute_")  # their public functions check the index, which waits on a GPU


def check(got, expected):
    rtol, atol = GEMM[expected[0].dtype]  # a gradient of a float32 delta is a product in the dtype of x
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=rtol, atol=atol * max(1, theirs.abs().max().item()))


def test_every_op_has_a_case():
    defined = {name for name, reference in REFERENCES.items() if reference.__module__.startswith("s2ft.ops.")}
    of_gradients = {name for name in defined if "_grad_" in name or name.endswith("_backward")}
    parts = {"grouped_mm", "grouped_outer"}  # what grouped_linear is made of
    assert {name.split()[0] for name in CASES} == defined - of_gradients - parts


@pytest.mark.parametrize("name", CASES)
def test_no_reference_waits(name):
    case = CASES[name]()
    expected = case.results()
    for directly in (False, True):
        with no_waits(directly):
            got = case.results()
        check(got, expected)


def may_wait(name):
    """Outside of a graph: the checks of ops that change a weight, and PyTorch's product of groups for many rows."""
    op, *options = name.split()
    if op != "grouped_linear":
        return op in CHECKED
    has_own_kernel = "torch.bfloat16" in options and torch.cuda.get_device_capability()[0] in (9, 10)
    return "16" in options and "torch.float64" not in options and not has_own_kernel


@pytest.mark.cuda
@pytest.mark.parametrize("name", CASES)
def test_no_op_waits_on_a_gpu_or_in_a_graph(name):
    """Once as PyTorch registers it, in a graph; the op is called before, as the documentation asks for it."""
    case = CASES[name]()
    expected = case.results()
    check(case.results("cuda"), expected)
    if not may_wait(name):
        inputs = [t.detach().cuda().requires_grad_(t.requires_grad) for t in case.tensors]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = case.run(*inputs)
            if out.requires_grad:
                out.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    inputs = [t.detach().cuda() for t in case.tensors]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = case.run(*inputs)
    graph.replay()
    results = [*([] if out is None else [out]), *inputs[: case.changed]]
    check(results, expected[: len(results)])


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
        lambda t: t.__setitem__(t > 1, 0),
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
    monkeypatch.setattr(sys.modules["s2ft.ops.permute_"], "PIECE", 20)
    case = permuted(0, (9, 7))
    expected = case.results()
    with no_waits():
        got = case.results()
    assert torch.equal(got[0], expected[0])


def test_a_capture_asks_for_most(monkeypatch):
    monkeypatch.setattr(sys.modules["s2ft.ops.grouped_linear"], "is_being_captured", lambda _: True)
    x, weight, delta = torch.ones(1, 2), torch.ones(1, 3, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match="give most"):
        ops.grouped_linear(x, weight, delta, torch.tensor([0]), torch.tensor([1], dtype=torch.int32), 0)
