"""permute_, swap_ and scatter_add_: the ops that change rows and columns of a weight in place."""

import subprocess
import sys

import pytest
import torch
from support.pairs import pairs
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft import build_info
from s2ft.ops import effective_units, permute_, scatter_add_, swap_
from s2ft.ops._library import check_distinct

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((7,), (1, 1), (13, 9), (3, 5, 4), (0, 3), (70, 130), (3, 5000))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
CASES = [(shape, dim) for shape in SHAPES for dim in range(len(shape))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,dim", CASES)
def test_swap_exchanges_and_a_second_swap_restores(shape, dim, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    for units in sorted({0, min(1, shape[dim]), (shape[dim] + 1) // 2, shape[dim]}):
        index = torch.randperm(shape[dim], device=device)[:units]
        values = torch.randn(*shape[:dim], units, *shape[dim + 1 :], device=device).to(dtype)
        w, v = weight.clone(), values.clone()
        swap_(w, index, v, dim)
        assert torch.equal(w, weight.index_copy(dim, index, values))
        assert torch.equal(v, weight.index_select(dim, index))
        swap_(w, index, v, dim)
        assert torch.equal(w, weight) and torch.equal(v, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,dim", CASES)
def test_permute_is_index_select_in_place(shape, dim, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    swapped = torch.arange(shape[dim])
    swapped[[0, -1] if shape[dim] else []] = swapped[[-1, 0] if shape[dim] else []]  # only two units move
    for order in (torch.arange(shape[dim]), torch.randperm(shape[dim]), torch.arange(shape[dim]).flip(0), swapped):
        order = order.to(device)
        w = weight.clone()
        permute_(w, order, dim)
        assert torch.equal(w, weight.index_select(dim, order))
        permute_(w, order.argsort(), dim)
        assert torch.equal(w, weight)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,dim", [((7, 200), 1), ((200, 7), 0), ((3, 200, 5), 1), ((2, 66_000), 1)])
@pytest.mark.parametrize("share", (0.03, 0.06, 0.2, 0.3, 0.9))
def test_permute_of_a_share_of_the_units(share, shape, dim, dtype, device):
    """Kernels use different code if few, some or nearly all units move."""
    weight = torch.randn(shape).to(dtype)
    moved = torch.randperm(shape[dim])[: int(share * shape[dim])]
    order = torch.arange(shape[dim])
    order[moved] = moved.roll(1)
    w = weight.clone().to(device)
    permute_(w, order.to(device), dim)
    assert torch.equal(w.cpu(), weight.index_select(dim, order))


def parts_of(shape, dim, dtype, device, sizes):
    """An index without repeats and a delta for each of `sizes`. The parts share units."""
    index = [torch.randperm(shape[dim], device=device)[:size] for size in sizes]
    return index, [torch.randn(*shape[:dim], len(i), *shape[dim + 1 :], device=device).to(dtype) for i in index]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case,dtype,delta_dtype", pairs(CASES, DTYPES, DTYPES), ids=str)
def test_scatter_add_adds_in_the_wider_type_and_rounds_once(case, dtype, delta_dtype, device):
    """The result equals the definition bit for bit, also if several deltas change the same unit."""
    shape, dim = case
    n = shape[dim]
    for sizes, alphas in ((((n + 1) // 2,), 1.0), ((n,), -0.3), ((n, n // 2, 0, n), (0.7, -1.1, 5.0, 1 / 3))):
        weight = torch.randn(shape, device=device).to(dtype)
        index, delta = parts_of(shape, dim, delta_dtype, device, sizes)
        wide = torch.promote_types(torch.promote_types(dtype, delta_dtype), torch.float32)
        expected = weight.to(wide)
        for i, d, alpha in zip(index, delta, [alphas] * len(sizes) if isinstance(alphas, float) else alphas):
            expected = expected.index_copy(dim, i, expected.index_select(dim, i) + alpha * d.to(wide))
        base, replaced = weight.clone(), [torch.empty_like(d, dtype=dtype) for d in delta]
        scatter_add_(weight, index, delta, dim, alphas, replaced)
        assert torch.equal(weight, expected.to(dtype))
        assert all(torch.equal(old, base.index_select(dim, i)) for old, i in zip(replaced, index))
        for i, old in zip(index, replaced):
            weight.index_copy_(dim, i, old)
        assert torch.equal(weight, base)
        scatter_add_(weight, index, delta, dim, alphas)  # the same without `replaced`
        assert torch.equal(weight, expected.to(dtype))


def test_scatter_add_of_one_delta_gives_the_effective_weight():
    weight, index = torch.randn(40, 30).bfloat16(), torch.tensor([4, 29, 0])
    delta = torch.randn(40, 3)
    expected = weight.index_copy(1, index, effective_units(weight.index_select(1, index), delta))
    scatter_add_(weight, index, delta, 1)
    assert torch.equal(weight, expected)


def test_scatter_add_accepts_deltas_of_several_dtypes():
    weight = torch.zeros(4, 2)
    scatter_add_(
        weight,
        [torch.tensor([1]), torch.tensor([1, 3])],
        [torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.float64)],
        0,
        (1, 2),
    )
    assert weight.tolist() == [[0, 0], [3, 3], [0, 0], [2, 2]]


LAYOUTS = {
    "transposed": lambda: torch.randn(8, 12).t(),
    "strided": lambda: torch.randn(24, 24)[::2, ::3],
    "offset": lambda: torch.randn(97)[1:].view(12, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", (0, 1))
def test_layouts(layout, dim):
    weight = LAYOUTS[layout]()
    original, order, index = weight.clone(), torch.randperm(weight.shape[dim]), torch.tensor([5, 0, 3])
    permute_(weight, order, dim)
    assert torch.equal(weight, original.index_select(dim, order))
    before = weight.index_select(dim, index)
    delta = LAYOUTS[layout]().narrow(dim, 2, 3)
    scatter_add_(weight, [index, index], [delta, delta.clone()], dim, (1.0, 1.0))
    assert torch.equal(weight.index_select(dim, index), before + delta + delta)
    values = torch.zeros_like(weight).narrow(dim, 1, 3)
    swap_(weight, index, values, dim)
    assert torch.equal(values, before + delta + delta) and not weight.index_select(dim, index).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", (permute_, scatter_add_, swap_), ids=lambda op: op.__name__)
def test_compiled_kernel_equals_reference(op, dtype, device):
    reference = sys.modules[f"s2ft.ops.{op.__name__}"].reference
    for shape, dim in CASES:
        weight, values = torch.randn(2, *shape, device=device).to(dtype)
        order = torch.randperm(shape[dim], device=device)
        index, delta = parts_of(shape, dim, torch.bfloat16, device, (shape[dim], shape[dim] // 2))
        results = []
        for run in (op, reference):
            w, v = weight.clone(), values.clone()
            run(
                w,
                *{permute_: (order, dim), swap_: (order, v, dim), scatter_add_: (index, delta, dim, [0.3, -2.0], [])}[
                    op
                ],
            )
            results.append((w, v))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


GROWTH = """
import resource, torch
from s2ft.ops import permute_
weight = torch.zeros(4096, 8192, dtype=torch.bfloat16)   # 64 MiB
order = torch.randperm(8192)
permute_(weight[:2], order, 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for dim in (0, 1):
    permute_(weight, order[: weight.shape[dim]].argsort(), dim)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(not build_info()["ops"]["permute_"], reason="the reference copies the units that move")
def test_permute_makes_no_second_matrix():
    run = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert float(run.stdout.splitlines()[-1]) < 4  # MiB


def test_opcheck():
    torch.library.opcheck(torch.ops.s2ft.swap_.default, (torch.randn(5, 6), torch.tensor([4, 0]), torch.randn(5, 2), 1))
    torch.library.opcheck(torch.ops.s2ft.permute_.default, (torch.randn(5, 6), torch.randperm(5), 0))
    torch.library.opcheck(
        torch.ops.s2ft.scatter_add_.default,
        (torch.randn(5, 6), [torch.tensor([4, 0])], [torch.randn(5, 2)], 1, [0.5], [torch.empty(5, 2)]),
    )


CHANGES = {
    "swap": lambda w: swap_(w, torch.tensor([1]), torch.randn(1, 6), 0),
    "permute": lambda w: permute_(w, torch.tensor([1, 0, 2, 3]), 0),
    "scatter": lambda w: scatter_add_(w, torch.tensor([1]), torch.randn(1, 6), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_backward_raises_if_the_weight_was_changed(change):
    weight, x = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    CHANGES[change](weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("change", CHANGES)
def test_torch_compile_fullgraph(change):
    """Later operations of the graph use the changed weight."""
    index, values, order = torch.tensor([1]), torch.randn(1, 6), torch.tensor([1, 0, 2, 3])

    def run(w, v):
        {
            "swap": lambda: swap_(w, index, v, 0),
            "permute": lambda: permute_(w, order, 0),
            "scatter": lambda: scatter_add_(w, index, v, 0, 0.5),
        }[change]()
        return w * 2

    compiled, weight = torch.compile(run, fullgraph=True, backend="aot_eager"), torch.randn(4, 6)
    (ours, values_of_ours), (theirs, values_of_theirs) = [(weight.clone(), values.clone()) for _ in range(2)]
    assert torch.equal(compiled(ours, values_of_ours), run(theirs, values_of_theirs))
    assert torch.equal(ours, theirs) and torch.equal(values_of_ours, values_of_theirs)


BAD = {
    "swap dim": (lambda w: swap_(w, torch.arange(2), torch.ones(2, 6), 2), "dim"),
    "swap high": (lambda w: swap_(w, torch.tensor([0, 4]), torch.ones(2, 6), 0), "index has 4"),
    "swap low": (lambda w: swap_(w, torch.tensor([-1, 0]), torch.ones(2, 6), 0), "index has -1"),
    "swap twice": (lambda w: swap_(w, torch.tensor([1, 1]), torch.ones(2, 6), 0), "twice"),
    "scatter high": (lambda w: scatter_add_(w, torch.tensor([0, 4]), torch.ones(2, 6), 0), "index has 4"),
    "scatter low in the second": (
        lambda w: scatter_add_(w, [torch.tensor([0]), torch.tensor([-1])], [torch.ones(1, 6), torch.ones(1, 6)], 0),
        "index has -1",
    ),
    "scatter twice": (lambda w: scatter_add_(w, torch.tensor([1, 1]), torch.ones(2, 6), 0), "twice"),
    "scatter delta": (lambda w: scatter_add_(w, torch.tensor([1, 2]), torch.ones(6, 2), 0), "delta must"),
    "scatter number": (lambda w: scatter_add_(w, [torch.tensor([1])], [], 0), "same number"),
    "scatter alphas": (lambda w: scatter_add_(w, torch.tensor([1]), torch.ones(1, 6), 0, [1, 2]), "same number"),
    "scatter replaced": (
        lambda w: scatter_add_(w, torch.tensor([1]), torch.ones(1, 6), 0, 1, torch.ones(2, 6)),
        "replaced must",
    ),
    "scatter replaced dtype": (
        lambda w: scatter_add_(w, torch.tensor([1]), torch.ones(1, 6), 0, 1, torch.ones(1, 6).double()),
        "replaced must have weight's dtype",
    ),
    "swap index": (lambda w: swap_(w, torch.tensor([1.0]), torch.ones(1, 6), 0), "int64"),
    "swap values": (lambda w: swap_(w, torch.tensor([1, 2]), torch.ones(6, 2), 0), "values must"),
    "swap dtype": (lambda w: swap_(w, torch.tensor([1]), torch.ones(1, 6).double(), 0), "values must"),
    "permute length": (lambda w: permute_(w, torch.arange(3), 0), "order must"),
    "permute repeat": (lambda w: permute_(w, torch.tensor([0, 1, 1, 3]), 0), "order names unit 1 twice"),
    "permute outside": (lambda w: permute_(w, torch.tensor([0, 1, 2, 4]), 0), "order has 4"),
    "permute dim": (lambda w: permute_(w, torch.arange(4), -1), "dim"),
}


class NoSingleNumbers(TorchDispatchMode):
    """Fails if code reads a single number of a tensor. On a GPU each such read waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ != "_local_scalar_dense"
        return function(*args, **(kwargs or {}))


def test_checking_an_index_does_not_read_its_numbers_one_by_one():
    with NoSingleNumbers():
        check_distinct("op", torch.randperm(9), 9)


@pytest.mark.parametrize("kernel", (True, False), ids=("kernel", "reference"))
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_raise_and_do_not_change_the_weight(bad, kernel, monkeypatch):
    for op in () if kernel else ("permute_", "scatter_add_", "swap_"):
        module = sys.modules[f"s2ft.ops.{op}"]
        monkeypatch.setattr(module, "_op", module.reference)
    call, message = BAD[bad]
    weight = torch.arange(24.0).view(4, 6)
    with pytest.raises(ValueError, match=message):
        call(weight)
    assert torch.equal(weight, torch.arange(24.0).view(4, 6))
