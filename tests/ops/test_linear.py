"""sliced_linear and indexed_linear: the ways to them, and what only they do. test_every_op.py has the common hazards."""

import pytest
import torch
from ops.cases import LINEAR, REGISTERED, upstream_of
from support.inside import _linear
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from s2ft.ops import act_mul

cases = pytest.mark.parametrize("name", LINEAR)


@cases
def test_modes_and_transforms_see_the_registered_op(name):
    seen, case = [], LINEAR[name]()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        case.run(*case.tensors).sum().backward()
    assert seen.count("s2ft.sliced_linear.default") == 2  # the product and the gradient of x
    x, *rest = (tensor.detach() for tensor in case.tensors)  # a trace holds no constants that require a gradient
    assert "sliced_linear" in str(torch.jit.trace(lambda x: case.run(x, *rest), x, check_trace=False).graph)


@cases
def test_forward_mode_is_refused(name):
    """The tangent would be lost in silence."""
    case = LINEAR[name]()
    x, *constants = (tensor.detach() for tensor in case.tensors)
    functions = (
        lambda x: case.run(x, *constants),
        lambda x: case.run(x, *case.tensors[1:]),
        lambda x: act_mul(x, x, "silu"),
    )
    for function in functions:
        for differentiate in (torch.func.jacfwd(function), torch.compile(torch.func.jacfwd(function), backend="eager")):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                differentiate(x)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
        act_mul(forward_ad.make_dual(x, x), x, "silu")


@pytest.mark.parametrize("name", [name for name in LINEAR if name.endswith("1")])
def test_a_delta_that_needs_a_gradient_needs_its_columns_of_x(name):
    (op, arguments), _ = LINEAR[name]().registered
    with pytest.raises(ValueError, match="columns of x"):
        getattr(REGISTERED, op)(*arguments[:-1], None)


@cases
def test_gradients_of_padded_slices(name, monkeypatch):
    """On a GPU, rows of kept columns start at multiples of 16 bytes. Here the CPU does the same."""
    monkeypatch.setattr(_linear, "_padding", lambda x, length: -length % 8)
    monkeypatch.setattr(_linear, "_is_slow_operand", lambda x, start, length: start % 8 > 0 or length % 8 > 0)
    for shape in ((10, 14, 3, 5), (8, 12, 0, 8), (12, 14, 3, 8)):
        case = LINEAR[name](shape=shape, leading=(2, 2), dtype=torch.float64)
        torch.testing.assert_close(case.results(), case.results(case.definition), rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradgradcheck(case.call, case.leaves, fast_mode=True)


def test_few_columns_and_the_cpu_get_no_padding():
    x = torch.empty(2, 300, dtype=torch.bfloat16)
    assert _linear._padding(x, 299) == 0
    on_gpu = type("", (), {"is_cuda": True, "element_size": lambda self: 2})()
    assert [_linear._padding(on_gpu, length) for length in (1, 127, 128, 430, 432)] == [0, 0, 0, 2, 0]
    places = [(0, 432), (8, 432), (4, 432), (4, 100), (0, 430)]
    assert [_linear._is_slow_operand(on_gpu, *place) for place in places] == [False, False, True, False, True]
    assert not _linear._is_slow_operand(x, 4, 299)


def check_wide_sums(name, shape, low, device):
    """The gradient of a float32 delta is not rounded to half precision on the way."""
    case = LINEAR[name](shape=shape, leading=(200,), dtype=low, delta_dtype=torch.float32)
    y, _, found, *_ = case.results(device=device)
    whole = upstream_of(y).cpu().double().t() @ case.tensors[0].detach().double()
    expected = whole.index_select(int(name[-1]), case.tensors[3])
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-3)
    assert not torch.equal(found, found.to(low).float())


@cases
def test_a_float32_delta_gets_sums_in_float32(name, monkeypatch):
    """Where the device can write them. A stand-in for torch.mm does it here."""
    product = torch.mm

    def mm(a, b, out_dtype=None):
        return product(a, b) if out_dtype is None else product(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(_linear, "_can_widen", lambda grad, dtype: dtype is torch.float32 is not grad.dtype)
    check_wide_sums(name, (16, 24, 3, 8), torch.bfloat16, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("low", (torch.bfloat16, torch.float16), ids=str)
@cases
def test_delta_gradients_on_a_gpu_are_not_rounded_to_half_precision(name, low):
    for units in (8, 131):  # 131 columns are padded
        check_wide_sums(name, (256, 512, 3, units), low, "cuda")
