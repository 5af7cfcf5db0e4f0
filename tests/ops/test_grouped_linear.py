"""grouped_linear: results and gradients equal the definition on every path that runs it."""

import itertools
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import GEMM

from s2ft.ops import grouped_linear
from s2ft.ops._grouped import grouped_mm, grouped_outer

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
# groups, outputs, inputs: one product for all groups, a loop over them
SHAPES = ((4, 16, 32), (3, 7, 5))
ROWS = (5, 0, 3, 1)  # a group without rows
UNITS = {"equal": (2, 2, 2, 2), "unequal": (3, 0, 1, 2), "one group": (0, 0, 0, 5)}


class Case:
    """Inputs of one call. `tail` rows at the end belong to no group."""

    def __init__(self, shape, dim, units="unequal", dtype=torch.float64, transposed=False, tail=0, device="cpu"):
        groups, outputs, inputs = shape
        self.dim, self.size = dim, (outputs, inputs)[dim]
        self.rows = ROWS[:groups]
        counts = UNITS[units][-groups:]
        self.offsets = torch.tensor(self.rows, device=device).cumsum(0, dtype=torch.int32)
        self.x = torch.randn(sum(self.rows) + tail, inputs, device=device).to(dtype).requires_grad_()
        weight = torch.randn(groups, outputs, inputs, device=device).to(dtype)
        self.weight = weight.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weight
        self.units = [torch.randperm(self.size)[:count] for count in counts]
        flat = [group * self.size + units for group, units in enumerate(self.units)]
        self.index, self.most = torch.cat(flat).to(device), max(counts)
        n = sum(counts)
        self.delta = torch.randn((n, inputs) if dim == 0 else (outputs, n), device=device).to(dtype).requires_grad_()

    def call(self, x=None, delta=None):
        x, delta = (self.x if x is None else x), (self.delta if delta is None else delta)
        return grouped_linear(x, self.weight, delta, self.index, self.offsets, self.dim, self.most)

    def effective(self):
        """The definition: clones of the weights with the delta added to their units, differentiable in delta."""
        parts, made = iter(self.delta.split([len(units) for units in self.units], self.dim)), []
        for weight, units in zip(self.weight, self.units):
            base, delta = weight.index_select(self.dim, units.to(weight.device)), next(parts)
            values = (base + delta).to(weight.dtype)
            made.append(weight.clone().index_copy(self.dim, units.to(weight.device), values))
        return torch.stack(made)

    def expected(self, x=None):
        x = self.x if x is None else x
        parts = x[: sum(self.rows)].split(self.rows)
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, self.effective())])

    @property
    def args(self):
        return self.weight, self.delta.detach(), self.index, self.most, self.offsets, self.dim


CASES = list(itertools.product(SHAPES, (0, 1), UNITS, (False, True)))


def name(value):
    return str(value).replace("torch.", "")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_equals_a_linear_layer_for_each_group(dtype, device):
    for shape, dim, units, transposed in CASES:
        case = Case(shape, dim, units, dtype, transposed, device=device)
        before = case.weight.clone()
        got, weights = case.call(), case.effective().detach()
        # The same product of the merged weights, as it is stored: bit for bit.
        stored = weights.transpose(1, 2).contiguous().transpose(1, 2) if transposed else weights
        assert torch.equal(got, grouped_mm(case.x, stored.transpose(1, 2), case.offsets))
        rtol, atol = GEMM[dtype]
        expected = case.expected()
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol * expected.abs().max().item())
        assert torch.equal(case.weight, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients_equal_autograd_through_the_definition(dtype, device):
    for shape, dim, units, transposed in CASES:
        case = Case(shape, dim, units, dtype, transposed, device=device)
        upstream = torch.randn_like(case.call())
        got = torch.autograd.grad(case.call(), (case.x, case.delta), upstream)
        for ours, theirs in zip(got, torch.autograd.grad(case.expected(), (case.x, case.delta), upstream)):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            rtol, atol = GEMM[dtype]
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * theirs.abs().max().item())


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("dim", (0, 1))
def test_first_and_second_derivatives_float64(dim, units):
    case = Case(SHAPES[1], dim, units)
    assert torch.autograd.gradcheck(case.call, (case.x, case.delta))
    assert torch.autograd.gradgradcheck(case.call, (case.x, case.delta))


@pytest.mark.parametrize("dim", (pytest.param(0, marks=pytest.mark.slow), 1))
def test_opcheck(dim):
    case = Case(SHAPES[0], dim, dtype=torch.float32)
    kept = torch.randn(9, 4, requires_grad=True) if dim == 1 else None
    grad = torch.randn(9, 16, requires_grad=True)
    weight, _, *rest = case.args
    torch.library.opcheck(torch.ops.s2ft.grouped_linear.default, (case.x, weight, case.delta, *rest, kept))
    torch.library.opcheck(torch.ops.s2ft.grouped_linear_grad_x.default, (grad, weight, case.delta, *rest))
    stack = torch.randn(4, 32, 8, requires_grad=True)
    torch.library.opcheck(grouped_mm, (case.x, stack, case.offsets))
    torch.library.opcheck(grouped_outer, (case.x, grad, case.offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_compiled_kernel_equals_reference(dtype):
    """The compiled kernel, if one is loaded, equals the PyTorch definition of the same op, bit for bit."""
    from s2ft.ops.grouped_linear import reference, reference_grad_x

    for (shape, dim, units, transposed), delta_dtype in itertools.product(CASES, DTYPES):
        case = Case(shape, dim, units, dtype, transposed)
        case.delta = case.delta.detach().to(delta_dtype)
        x, grad = case.x.detach(), torch.randn(sum(case.rows), shape[1]).to(dtype)
        assert torch.equal(torch.ops.s2ft.grouped_linear(x, *case.args, None), reference(x, *case.args, None))
        assert torch.equal(torch.ops.s2ft.grouped_linear_grad_x(grad, *case.args), reference_grad_x(grad, *case.args))


def test_neighbouring_units_of_two_groups():
    """The last unit of a group and the first of the next have neighbouring numbers, and are no neighbours in memory."""
    for dim, transposed in itertools.product((0, 1), (False, True)):
        case = Case(SHAPES[0], dim, "equal", torch.float32, transposed)
        case.units = [torch.tensor([0, case.size - 1])] * 4
        case.index = torch.cat([group * case.size + units for group, units in enumerate(case.units)])
        before = case.weight.clone()
        torch.testing.assert_close(case.call(), case.expected(), rtol=1e-5, atol=1e-4)
        assert torch.equal(case.weight, before)


def test_rows_of_no_group_get_no_gradient_into_delta():
    case = Case(SHAPES[0], 1, dtype=torch.float32, tail=3)
    rows = sum(case.rows)
    upstream = torch.randn(rows + 3, 16)
    (got,) = torch.autograd.grad(case.call(), case.delta, upstream)
    (expected,) = torch.autograd.grad(case.expected(), case.delta, upstream[:rows])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ("offset", "strided", "expanded"))
@pytest.mark.parametrize("dim", (0, 1))
def test_layouts_of_the_weight(layout, dim):
    case = Case(SHAPES[0], dim, dtype=torch.float32)
    groups, outputs, inputs = case.weight.shape
    case.weight = {
        "offset": lambda: torch.randn(case.weight.numel() + 1)[1:].view(groups, outputs, inputs),
        "strided": lambda: torch.randn(2 * groups, outputs, 3 * inputs)[::2, :, ::3],
        "expanded": lambda: torch.randn(outputs, inputs).expand(groups, outputs, inputs),
    }[layout]()
    before = case.weight.clone()
    expected = case.expected()
    torch.testing.assert_close(case.call(), expected, rtol=1e-5, atol=1e-4)
    got = torch.autograd.grad(case.call().sum(), (case.x, case.delta))
    for ours, theirs in zip(got, torch.autograd.grad(expected.sum(), (case.x, case.delta))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert torch.equal(case.weight, before)


@pytest.mark.parametrize("dim", (0, 1))
def test_autocast(dim):
    """base + delta is added in float32 and rounded once. The delta's gradient stays float32."""
    case = Case(SHAPES[0], dim, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = case.call()
    assert y.dtype is torch.bfloat16
    effective = case.effective().to(torch.bfloat16)
    assert torch.equal(y, grouped_mm(case.x.to(torch.bfloat16), effective.transpose(1, 2), case.offsets))
    y.float().sum().backward()
    assert case.delta.grad.dtype is torch.float32 and case.x.grad.dtype is torch.float32


@pytest.mark.parametrize("dim", (0, pytest.param(1, marks=pytest.mark.slow)))
def test_torch_compile_fullgraph(dim):
    case = Case(SHAPES[dim], dim, dtype=torch.float32)
    call = torch.compile(lambda x, delta: case.call(x, delta) * 2, fullgraph=True, backend="aot_eager")
    eager, got = case.call() * 2, call(case.x, case.delta)
    assert torch.equal(got, eager)
    upstream = torch.randn_like(eager)
    for ours, theirs in zip(
        torch.autograd.grad(got, (case.x, case.delta), upstream),
        torch.autograd.grad(eager, (case.x, case.delta), upstream),
    ):
        assert torch.equal(ours, theirs)


def test_backward_keeps_only_the_selected_columns_of_x():
    """They are padded to 16 bytes: 3 units become 4 float32 columns. A frozen delta keeps none."""
    for trains, expected in ((True, 9 * 4 * 4), (False, 0)):
        case = Case(SHAPES[0], 1, "unequal", torch.float32)
        own = {t.untyped_storage().data_ptr() for t in (case.weight, case.delta, case.index, case.offsets)}
        kept = []

        def pack(tensor, own=own, kept=kept):
            if tensor.untyped_storage().data_ptr() not in own:
                kept.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            case.call(case.x.detach(), case.delta if trains else case.delta.detach())
        assert sum(kept) == expected


def test_most_is_counted_if_it_is_not_given():
    case = Case(SHAPES[0], 1, dtype=torch.float32)
    y = grouped_linear(case.x, case.weight, case.delta, case.index, case.offsets, 1)
    assert torch.equal(y, case.call())
    (got,), (expected,) = (torch.autograd.grad(z.sum(), case.delta) for z in (y, case.call()))
    assert torch.equal(got, expected)


def test_threads_that_share_a_weight():
    """Calls with different deltas on one weight wait for each other and restore the base."""
    case = Case(SHAPES[0], 1, dtype=torch.float32)
    before = case.weight.clone()
    deltas = [torch.randn_like(case.delta) for _ in range(3)]
    expected, number, wrong = [case.call(delta=delta) for delta in deltas], torch.get_num_threads(), []

    def work(delta, result):
        torch.set_num_threads(number)  # a new thread has MKL's default number, which changes the order of sums
        for _ in range(50):
            if not torch.equal(case.call(delta=delta), result):
                wrong.append(True)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(deltas, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(case.weight, before)


def test_a_failed_product_restores_the_base(monkeypatch):
    module = sys.modules[grouped_linear.__module__]
    case = Case(SHAPES[0], 1, dtype=torch.float32)
    before = case.weight.clone()

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(module, "product", fail)
    with pytest.raises(MemoryError):
        module.reference(case.x, *case.args, None)
    assert torch.equal(case.weight, before)


def test_a_product_that_fails_in_the_kernel_restores_the_base():
    """Offsets beyond the rows make the loop over the groups fail, after base + delta was written."""
    case = Case(SHAPES[1], 1, dtype=torch.float32)
    before = case.weight.clone()
    with pytest.raises(RuntimeError):
        grouped_linear(case.x, case.weight, case.delta.detach(), case.index, case.offsets + 40, 1, case.most)
    assert torch.equal(case.weight, before)


WRONG = {
    "dim": (dict(dim=2), "dim must be 0"),
    "weight": (dict(weight=torch.ones(6, 5)), "weight must be"),
    "x": (dict(x=torch.ones(3, 4)), "x of shape"),
    "delta": (dict(delta=torch.ones(2, 4)), "delta of shape"),
    "offsets dtype": (dict(offsets=torch.tensor([1, 3])), "offsets must be int32"),
    "offsets length": (dict(offsets=torch.tensor([3], dtype=torch.int32)), r"shape \(2,\)"),
    "index length": (dict(index=torch.arange(3)), "index must be int64"),
    "index high": (dict(index=torch.tensor([0, 12])), "index has 12"),
    "index low": (dict(index=torch.tensor([-1, 3])), "index has -1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_are_named(wrong):
    change, message = WRONG[wrong]
    good = dict(
        x=torch.ones(3, 5),
        weight=torch.ones(2, 6, 5),
        delta=torch.ones(2, 5),
        index=torch.tensor([0, 6]),
        offsets=torch.tensor([1, 3], dtype=torch.int32),
        dim=0,
    )
    given = {**good, **change}
    before = given["weight"].clone()
    for trains in (False, True):
        with pytest.raises(ValueError, match=message):
            grouped_linear(**{**given, "delta": given["delta"].requires_grad_(trains)}, most=1)
    assert torch.equal(given["weight"], before)
