"""sliced_linear and indexed_linear: results and gradients equal the definition on every path that runs them."""

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from support.tolerances import GEMM

import s2ft
from s2ft.ops import _linear, act_mul, indexed_linear, sliced_linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LEADING = ((), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
# outputs, inputs, first unit, units: odd, one unit, all units, the last unit
SHAPES = ((7, 11, 2, 3), (16, 32, 0, 1), (8, 8, 0, 8), (33, 17, 16, 1))


class Case:
    """Inputs of one call, for a slice or for the same number of scattered units."""

    def __init__(self, op, shape, dim, dtype=torch.float64, leading=(3,), bias=True, device="cpu", delta_dtype=None):
        outputs, inputs, start, units = shape
        size = (outputs, inputs)[dim]
        self.op, self.dim, self.dtype = op, dim, dtype
        start = min(start, size - units)
        self.units = start if op is sliced_linear else torch.randperm(size, device=device)[:units]
        self.index = torch.arange(start, start + units, device=device) if op is sliced_linear else self.units
        self.x = torch.randn(*leading, inputs, device=device).to(dtype).requires_grad_()
        self.weight = torch.randn(outputs, inputs, device=device).to(dtype)
        delta = torch.randn((units, inputs) if dim == 0 else (outputs, units), device=device)
        self.delta = delta.to(delta_dtype or dtype).requires_grad_()
        self.bias = torch.randn(outputs, device=device).to(dtype).requires_grad_() if bias else None

    def call(self, x=None, delta=None, bias=None):
        return self.op(
            self.x if x is None else x,
            self.weight,
            self.delta if delta is None else delta,
            self.units,
            self.dim,
            self.bias if bias is None else bias,
        )

    def effective(self):
        """The definition: a clone of the weight with the delta added to its units, differentiable in delta."""
        base = self.weight.index_select(self.dim, self.index)
        values = (base + self.delta).to(self.weight.dtype)
        return self.weight.clone().index_copy(self.dim, self.index, values)


OPS = (sliced_linear, indexed_linear)
OPS_AND_DIMS = list(itertools.product(OPS, (0, 1)))
CASES = list(itertools.product(OPS, SHAPES, (0, 1)))


def name(value):
    return value.__name__ if callable(value) else str(value).replace("torch.", "")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op,shape,dim", CASES, ids=name)
def test_equals_linear_on_the_merged_weight_bit_for_bit(op, shape, dim, dtype, device):
    for leading, bias in itertools.product(LEADING, (True, False)):
        case = Case(op, shape, dim, dtype, leading, bias, device)
        before = case.weight.clone()
        assert torch.equal(case.call(), F.linear(case.x, case.effective(), case.bias))
        assert torch.equal(case.weight, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op,shape,dim", CASES, ids=name)
def test_gradients_equal_autograd_through_the_definition(op, shape, dim, dtype, device):
    case = Case(op, shape, dim, dtype, (4, 3), device=device)
    upstream = torch.randn_like(case.call())
    leaves = (case.x, case.delta, case.bias)
    got = torch.autograd.grad(case.call(), leaves, upstream)
    expected = torch.autograd.grad(F.linear(case.x, case.effective(), case.bias), leaves, upstream)
    for ours, theirs in zip(got, expected):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        rtol, atol = GEMM[dtype]
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * theirs.abs().max().item())


@pytest.mark.parametrize("op,shape,dim", CASES, ids=name)
def test_gradcheck_float64(op, shape, dim):
    case = Case(op, shape, dim)
    assert torch.autograd.gradcheck(case.call, (case.x, case.delta, case.bias))


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_opcheck(op, dim):
    case = Case(op, SHAPES[0], dim, torch.float32)
    ops = getattr(torch.ops.s2ft, op.__name__).default, getattr(torch.ops.s2ft, op.__name__ + "_grad_x").default
    kept = torch.randn(*case.x.shape[:-1], case.delta.shape[1], requires_grad=True) if dim == 1 else None
    for bias in (case.bias, None):
        torch.library.opcheck(ops[0], (case.x, case.weight, case.delta, case.units, dim, bias, kept))
    torch.library.opcheck(ops[1], (torch.randn(3, 7, requires_grad=True), case.weight, case.delta, case.units, dim))


@pytest.mark.parametrize("op,shape,dim", CASES, ids=name)
def test_second_derivatives_float64(op, shape, dim):
    """A gradient penalty or a Hessian-vector product needs them, with respect to x, delta and bias."""
    case = Case(op, shape, dim)
    assert torch.autograd.gradgradcheck(case.call, (case.x, case.delta, case.bias))


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_a_delta_that_needs_a_gradient_needs_its_columns_of_x(op, dim):
    case = Case(op, SHAPES[0], dim, torch.float32)
    if dim == 1:
        with pytest.raises(ValueError, match="selected columns of x, must be given"):
            getattr(torch.ops.s2ft, op.__name__)(case.x, case.weight, case.delta, case.units, dim, None, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op,shape,dim", CASES, ids=name)
def test_compiled_kernel_equals_reference(op, shape, dim, dtype, device):
    """The compiled kernel, if one is loaded, equals the PyTorch definition of the same op, bit for bit."""
    for delta_dtype in DTYPES:
        case = Case(op, shape, dim, dtype, (5,), device=device, delta_dtype=delta_dtype)
        args = (case.weight, case.delta.detach(), case.units, dim)
        x, bias, grad = case.x.detach(), case.bias.detach(), torch.randn(5, shape[0], device=device).to(dtype)
        dispatched = getattr(torch.ops.s2ft, op.__name__)(x, *args, bias, None)
        assert torch.equal(dispatched, _linear.reference(x, *args, bias, None))
        dispatched = getattr(torch.ops.s2ft, op.__name__ + "_grad_x")(grad, *args)
        assert torch.equal(dispatched, _linear.reference_grad_x(grad, *args))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dim", (0, 1))
def test_several_segments(dim, dtype):
    """Heads are runs of neighbouring units. Here they are long and short, adjacent and apart, and in any order."""
    case = Case(indexed_linear, (120, 120, 0, 91), dim, dtype)
    runs = (range(80, 112), range(16), range(16, 48), range(50, 59), (49,), (113,))
    case.units = case.index = torch.tensor([unit for run in runs for unit in run])
    before = case.weight.clone()
    assert torch.equal(case.call(), F.linear(case.x, case.effective(), case.bias))
    assert torch.equal(case.weight, before)


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
@pytest.mark.parametrize("layout", ("transposed", "strided", "offset", "expanded"))
def test_layouts_of_x_and_weight(op, dim, layout):
    case = Case(op, SHAPES[0], dim, torch.float32, (4, 5))
    outputs, inputs = case.weight.shape
    make = {
        "transposed": lambda: torch.randn(inputs, outputs).t(),
        "strided": lambda: torch.randn(outputs * 2, inputs * 3)[::2, ::3],
        "offset": lambda: torch.randn(outputs * inputs + 1)[1:].view(outputs, inputs),
        "expanded": lambda: torch.randn(1, inputs).expand(outputs, inputs),
    }
    case.weight = make[layout]()
    case.x = torch.randn(5, 4, inputs * 2)[:, :, ::2].transpose(0, 1).requires_grad_()
    before = case.weight.clone()
    expected = F.linear(case.x, case.effective(), case.bias)
    torch.testing.assert_close(case.call(), expected, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad(case.call().sum(), (case.x, case.delta))
    for ours, theirs in zip(got, torch.autograd.grad(expected.sum(), (case.x, case.delta))):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(case.weight, before)


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=name)
def test_autocast(op, dim, low, compiled):
    """base + delta is added in float32 and rounded once. The delta's gradient stays float32."""
    case = Case(op, SHAPES[0], dim, torch.float32, (4,))
    call = torch.compile(case.call, fullgraph=True, backend="aot_eager") if compiled else case.call
    with torch.autocast("cpu", low):
        y = call()
    assert y.dtype is low
    expected = F.linear(case.x.to(low), case.effective().to(low), case.bias.to(low))
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert case.delta.grad.dtype is torch.float32 and case.x.grad.dtype is torch.float32


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=name)
def test_torch_compile_fullgraph(op, dim, dtype):
    case = Case(op, SHAPES[0], dim, dtype, (4, 3), delta_dtype=torch.float32)
    call = torch.compile(
        lambda x, delta: op(x, case.weight, delta, case.units, dim, case.bias) * 2, fullgraph=True, backend="aot_eager"
    )
    eager = op(case.x, case.weight, case.delta, case.units, dim, case.bias) * 2
    got = call(case.x, case.delta)
    assert torch.equal(got, eager)
    upstream = torch.randn_like(eager)
    for ours, theirs in zip(
        torch.autograd.grad(got, (case.x, case.delta), upstream),
        torch.autograd.grad(eager, (case.x, case.delta), upstream),
    ):
        assert torch.equal(ours, theirs)


class Watched(torch.Tensor):
    """A subclass that does nothing."""


def registered(case):
    """Call the registered op, as a compiler, a mode or a subclass of Tensor sees it."""
    case.x = case.x.as_subclass(Watched)
    return case.call().as_subclass(torch.Tensor)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=name)
@pytest.mark.parametrize("op,shape,dim", CASES, ids=name)
def test_one_node_equals_the_registered_op_bit_for_bit(op, shape, dim, dtype):
    for trains_x, leading in itertools.product((True, False), ((4, 3), (3,), ())):
        case = Case(op, shape, dim, dtype, leading, delta_dtype=torch.promote_types(dtype, torch.float32))
        x = case.x.requires_grad_(trains_x)
        leaves = (x, case.delta, case.bias) if trains_x else (case.delta, case.bias)
        ours = case.call()
        theirs = registered(case)
        assert "_Node" in ours.grad_fn.name() and torch.equal(ours, theirs)
        upstream = torch.randn_like(ours)
        for one, other in zip(
            torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream)
        ):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_modes_and_transforms_see_the_registered_op(op, dim):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    case = Case(op, SHAPES[0], dim)
    with Seen() as seen:
        case.call().sum().backward()
    assert {f"s2ft.{op.__name__}.default", f"s2ft.{op.__name__}_grad_x.default"} <= set(seen.names)
    constants = [tensor.detach() for tensor in (case.delta, case.bias)]  # a trace holds none that require a gradient
    traced = torch.jit.trace(lambda x: case.call(x, *constants), case.x.detach(), check_trace=False)
    assert op.__name__ in str(traced.graph)


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_forward_mode_is_refused(op, dim):
    """The tangent would be lost in silence."""
    case = Case(op, SHAPES[0], dim)
    x, constants = case.x.detach(), [tensor.detach() for tensor in (case.delta, case.bias)]
    functions = (lambda x: case.call(x, *constants), lambda x: case.call(x), lambda x: act_mul(x, x, "silu"))
    for function in functions:
        for differentiate in (torch.func.jacfwd(function), torch.compile(torch.func.jacfwd(function), backend="eager")):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                differentiate(x)


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("op", OPS, ids=name)
def test_gradients_of_padded_slices(op, dim, monkeypatch):
    """On a GPU, rows of kept columns start at multiples of 16 bytes. Here the CPU does the same."""
    monkeypatch.setattr(_linear, "_padding", lambda x, length: -length % 8)
    monkeypatch.setattr(_linear, "_is_slow_operand", lambda x, start, length: start % 8 > 0 or length % 8 > 0)
    for shape in ((10, 14, 3, 5), (8, 12, 0, 8), (12, 14, 3, 8)):
        case = Case(op, shape, dim, leading=(2, 5))
        leaves = (case.x, case.delta, case.bias)
        y = case.call()
        upstream = torch.randn_like(y)
        expected = torch.autograd.grad(F.linear(case.x, case.effective(), case.bias), leaves, upstream)
        for ours, theirs in zip(torch.autograd.grad(y, leaves, upstream), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradgradcheck(case.call, leaves)


def test_few_columns_and_the_cpu_get_no_padding():
    x = torch.empty(2, 300, dtype=torch.bfloat16)
    assert _linear._padding(x, 299) == 0
    on_gpu = type("", (), {"is_cuda": True, "element_size": lambda self: 2})()
    assert [_linear._padding(on_gpu, length) for length in (1, 127, 128, 430, 432)] == [0, 0, 0, 2, 0]
    places = [(0, 432), (8, 432), (4, 432), (4, 100), (0, 430)]
    assert [_linear._is_slow_operand(on_gpu, *place) for place in places] == [False, False, True, False, True]
    assert not _linear._is_slow_operand(x, 4, 299)


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_a_float32_delta_gets_sums_in_float32(op, dim, monkeypatch):
    """Where the device can write them. A stand-in for torch.mm does it here."""
    product = torch.mm

    def mm(a, b, out_dtype=None):
        return product(a, b) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(_linear, "_can_widen", lambda grad, dtype: dtype is torch.float32 is not grad.dtype)
    case = Case(op, (16, 24, 3, 8), dim, torch.bfloat16, (50,), delta_dtype=torch.float32)
    y = case.call()
    upstream = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, case.delta, upstream)
    whole = upstream.double().t() @ case.x.double()
    torch.testing.assert_close(found.double(), whole.index_select(dim, case.index), rtol=1e-5, atol=1e-4)
    assert not torch.equal(found, found.to(torch.bfloat16).float())


@pytest.mark.cuda
@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=name)
@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_delta_gradients_on_a_gpu_are_not_rounded_to_half_precision(op, dim, low):
    for units in (8, 131):  # 131 columns are padded
        case = Case(op, (256, 512, 3, units), dim, low, (4, 50), device="cuda", delta_dtype=torch.float32)
        y = case.call()
        upstream = torch.randn_like(y)
        (found,) = torch.autograd.grad(y, case.delta, upstream)
        whole = upstream.double().flatten(0, 1).t() @ case.x.double().flatten(0, 1)
        expected = whole.index_select(dim, case.index)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
        assert not torch.equal(found, found.to(low).float())


def test_float32_delta_on_bfloat16_weight_is_not_lost():
    """An update far below a bfloat16 step changes no weight by itself, but many of them add up to a change."""
    weight, x = torch.ones(4, 4, dtype=torch.bfloat16), torch.eye(4, dtype=torch.bfloat16)
    tiny = torch.full((1, 4), 1e-4)
    assert torch.equal(sliced_linear(x, weight, tiny, 0, 0), F.linear(x, weight))
    assert not torch.equal(sliced_linear(x, weight, 100 * tiny, 0, 0), F.linear(x, weight))


@pytest.mark.parametrize("op", OPS, ids=name)
def test_backward_keeps_only_the_selected_columns_of_x(op):
    """dim 1 keeps n columns of x, as a copy, because a view would keep all of x. A frozen delta keeps none."""
    case = Case(op, (8, 64, 3, 2), 1, torch.float32, (100,))
    for trains, expected in ((True, 100 * 2 * 4), (False, 0)):
        kept = []
        arguments = {t.untyped_storage().data_ptr() for t in (case.weight, case.delta, case.bias, case.index)}
        delta = case.delta if trains else case.delta.detach()

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in arguments:
                kept.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            op(case.x, case.weight, delta, case.units, 1)
        assert sum(kept) == expected


@pytest.mark.parametrize("op,dim", OPS_AND_DIMS, ids=name)
def test_two_forwards_before_backward(op, dim):
    """A call does not change the weight's version, so the backward of an earlier call still runs."""
    case = Case(op, SHAPES[0], dim, torch.float32)
    first, second = case.call(), case.call(x=case.x * 2)
    (first + second).sum().backward()
    assert case.delta.grad is not None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("op", OPS)
def test_the_output_may_be_changed_in_place(op, leading, bias):
    """OLMo's clip_qkv does it. Autograd refuses it for an output that is a view."""
    case = Case(op, SHAPES[0], 0, leading=leading, bias=bias)
    inputs = [case.x, case.delta]
    expected = torch.autograd.grad(F.linear(case.x, case.effective(), case.bias).clamp(-1, 1).square().sum(), inputs)
    found = torch.autograd.grad(case.call().clamp_(-1, 1).square().sum(), inputs)
    assert all(torch.allclose(ours, theirs, *GEMM[torch.float64]) for ours, theirs in zip(found, expected))


def test_delta_changed_between_forward_and_backward_raises():
    case = Case(sliced_linear, SHAPES[0], 1, torch.float32)
    y = case.call()
    with torch.no_grad():
        case.delta.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", OPS, ids=name)
def test_threads_that_share_a_weight(op):
    """Calls with different deltas on one weight wait for each other and restore the base."""
    case = Case(op, (64, 64, 5, 20), 1, torch.float32, (50,), bias=False)
    before = case.weight.clone()
    deltas = [torch.randn_like(case.delta) for _ in range(4)]
    expected = [op(case.x, case.weight, delta, case.units, 1) for delta in deltas]
    wrong, number = [], torch.get_num_threads()

    def work(delta, result):
        torch.set_num_threads(number)  # a new thread has MKL's default number, which changes the order of sums
        for _ in range(100):
            if not torch.equal(op(case.x, case.weight, delta, case.units, 1), result):
                wrong.append(True)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(deltas, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(case.weight, before)


def test_a_failed_product_restores_the_base(monkeypatch):
    case = Case(sliced_linear, SHAPES[0], 1, torch.float32)
    before = case.weight.clone()

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(_linear.F, "linear", fail)
    with pytest.raises(MemoryError):
        _linear.reference(case.x, case.weight, case.delta, 2, 1, None, None)
    assert torch.equal(case.weight, before)


def test_repeated_index_restores_the_base():
    """The op does not allow a repeated index, but the base must be restored all the same."""
    weight, before = (w := torch.randn(6, 6)), w.clone()
    for dim in (0, 1):
        indexed_linear(torch.randn(2, 6), weight, torch.randn(6, 6).narrow(dim, 0, 3), torch.tensor([4, 1, 4]), dim)
        assert torch.equal(weight, before)


BAD = {
    "dim": (lambda w: sliced_linear(torch.ones(2, 6), w, torch.ones(2, 6), 0, 2), "dim must be 0"),
    "reversed": (lambda w: sliced_linear(torch.ones(2, 6), w, torch.ones(2, 6), -1, 0), "slice -1:1"),
    "outside": (lambda w: sliced_linear(torch.ones(2, 6), w, torch.ones(2, 6), 3, 0), "slice 3:5 outside"),
    "x": (lambda w: sliced_linear(torch.ones(2, 5), w, torch.ones(2, 6), 0, 0), "x of shape"),
    "delta": (lambda w: sliced_linear(torch.ones(2, 6), w, torch.ones(2, 5), 0, 0), "delta of shape"),
    "bias": (lambda w: sliced_linear(torch.ones(2, 6), w, torch.ones(2, 6), 0, 0, torch.ones(6)), "bias must"),
    "index dtype": (lambda w: indexed_linear(torch.ones(2, 6), w, torch.ones(2, 6), torch.ones(2), 0), "int64"),
    "index length": (lambda w: indexed_linear(torch.ones(2, 6), w, torch.ones(2, 6), torch.arange(3), 0), "shape"),
    "index high": (
        lambda w: indexed_linear(torch.ones(2, 6), w, torch.ones(2, 6), torch.tensor([0, 4]), 0),
        "index has 4",
    ),
    "index low": (
        lambda w: indexed_linear(torch.ones(2, 6), w, torch.ones(2, 6), torch.tensor([0, -1]), 0),
        "index has -1",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_raise_and_do_not_change_the_weight(bad):
    call, message = BAD[bad]
    weight = torch.ones(4, 6)
    with pytest.raises(ValueError, match=message):
        call(weight)
    assert torch.equal(weight, torch.ones(4, 6))


DELTA = torch.ones(4, 2, requires_grad=True)
BAD_COLUMNS = {
    "reversed": (sliced_linear, torch.ones(2, 6), DELTA, -1, "slice -1:1 outside"),
    "outside": (sliced_linear, torch.ones(2, 6), DELTA, 5, "slice 5:7 outside"),
    "x": (sliced_linear, torch.ones(2, 5), DELTA, 4, "x of shape"),
    "no x": (sliced_linear, torch.ones(()), DELTA, 0, "x of shape"),
    "delta": (sliced_linear, torch.ones(2, 6), torch.ones(2, requires_grad=True), 0, "must be matrices|be a matrix"),
    "index dtype": (indexed_linear, torch.ones(2, 6), DELTA, torch.ones(2), "int64"),
    "index length": (indexed_linear, torch.ones(2, 6), DELTA, torch.arange(3), "shape"),
    "index high": (indexed_linear, torch.ones(2, 6), DELTA, torch.tensor([0, 6]), "index has 6"),
    "index low": (indexed_linear, torch.ones(2, 6), DELTA, torch.tensor([0, -1]), "index has -1"),
}


@pytest.mark.parametrize("bad", BAD_COLUMNS)
def test_bad_arguments_are_named_where_x_is_read_before_the_op(bad):
    """With dim 1 and a trained delta, the selected columns of x are copied before the op checks its arguments."""
    op, x, delta, units, message = BAD_COLUMNS[bad]
    with pytest.raises(ValueError, match=message):
        op(x, torch.ones(4, 6), delta, units, 1)


@pytest.mark.parametrize("op", OPS, ids=name)
def test_only_the_kernel_checks_the_arguments_of_a_correct_call(op, monkeypatch):
    monkeypatch.setattr(_linear, "check", lambda *args: pytest.fail("checked twice"))
    if s2ft.build_info()["ops"][op.__name__]:
        for dim in (0, 1):
            Case(op, SHAPES[0], dim, torch.float32).call().sum().backward()


def test_mixed_dtypes_outside_autocast_raise():
    with pytest.raises(TypeError, match="x is torch.float32 and weight is torch.bfloat16"):
        sliced_linear(torch.ones(2, 6), torch.ones(4, 6, dtype=torch.bfloat16), torch.ones(2, 6), 0, 0)


@pytest.mark.parametrize("shape", ((6,), (3, 6), (2, 3, 6)))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dim", (0, 1))
def test_output_can_be_written_to(shape, bias, dim):
    """As nn.ReLU(inplace=True) does, and the attention of Longformer."""
    torch.manual_seed(0)
    x, weight, index = torch.randn(shape, requires_grad=True), torch.randn(4, 6), torch.tensor([0, 2])
    delta = torch.randn((2, 6) if dim == 0 else (4, 2), requires_grad=True)
    bias = torch.randn(4) if bias else None
    for op, units in ((sliced_linear, 1), (indexed_linear, index)):
        grads = []
        for write in (True, False):
            y = op(x, weight, delta, units, dim, bias)
            y = y.mul_(2).relu_() if write else (y * 2).relu()
            grads.append(torch.autograd.grad(y.square().sum(), (x, delta)))
        for one, two in zip(*grads):
            torch.testing.assert_close(one, two)
