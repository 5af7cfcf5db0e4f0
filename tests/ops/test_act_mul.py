"""act_mul: an activation and a product in one op, with the numbers of PyTorch's two operators."""

import math

import pytest
import torch
from ops.cases import DTYPES, TRUTH
from support.inside import ACTIVATIONS, reference, reference_backward

from s2ft.ops import act_mul

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
act_mul_backward = torch.ops.s2ft.act_mul_backward


def inputs(shape, dtype):
    return [(torch.randn(shape) * scale).to(dtype) for scale in (5, 1, 1)]


def both(gate, up, grad, activation):
    """The result and the gradients of the op, and those of PyTorch's operators."""
    ours = [act_mul(gate, up, activation), *act_mul_backward(grad, gate, up, activation)]
    return ours, [reference(gate, up, activation), *reference_backward(grad, gate, up, activation)]


def all_bfloat16():
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("activation", ("silu", "relu"))
def test_bfloat16_equals_pytorch_bit_for_bit(activation):
    gates, (gate, up, grad) = all_bfloat16(), inputs((1000, 100), torch.bfloat16)
    one = torch.ones_like(gates)
    for tensors in ((gates, one, one), (gate, up, grad)):
        torch.testing.assert_close(*both(*tensors, activation), rtol=0, atol=0, equal_nan=True)


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns", ((3, 7), (130, 64), (5, 4097), (0, 4), (4, 0)))
def test_halves_of_one_product_are_read_where_they_are(activation, dtype, rows, columns):
    gate, up = (torch.randn(rows, 2 * columns + 3) * 2).to(dtype)[:, 3:].chunk(2, -1)
    grad = torch.randn(rows, columns).to(dtype)
    dense = [one.contiguous() for one in (gate, up)]
    # float16 is left to PyTorch on the CPU, whose operators round views with gaps in another way
    close = dict(rtol=2**-8, atol=2**-12) if dtype == torch.float16 else dict(rtol=0, atol=0)
    for pair in ((gate, up), (gate, dense[1]), (up.t().contiguous().t(), up)):
        here = [one.contiguous() for one in pair]
        torch.testing.assert_close(act_mul(*pair, activation), act_mul(*here, activation), **close)
        found = act_mul_backward(grad, *pair, activation)
        torch.testing.assert_close(found, act_mul_backward(grad, *here, activation), **close)
        assert all(one.is_contiguous() for one in (act_mul(*pair, activation), *found))


@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh"))
def test_bfloat16_gelu_is_close_to_pytorch(activation):
    """Not bit for bit: PyTorch computes the lower tail as 1 + erf or 1 + tanh, whose digits cancel in float32.

    Elsewhere the two differ by at most one bfloat16 step, before the products with up and grad.
    """
    gate = all_bfloat16()
    gate = gate[gate.abs() < 1e18]  # beyond, PyTorch's gelu_tanh has NaN gradients; see test_extreme_values
    one = torch.ones_like(gate)
    torch.testing.assert_close(*both(gate, one, one, activation), rtol=2**-7, atol=2e-6)
    torch.testing.assert_close(
        act_mul(gate, one, activation).double(), TRUTH[activation](gate.double())[0], rtol=2**-7, atol=1e-36
    )


@every_activation
def test_float32_keeps_its_digits_in_the_lower_tail(activation):
    gate = torch.linspace(-40, 40, 400_001)
    expected = TRUTH[activation](gate.double())[0]
    rtol = 2e-5 if activation == "gelu_tanh" else 6e-7  # rounding u once changes e^2u by that much
    ours = act_mul(gate, torch.ones_like(gate), activation).double()
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-36)


@every_activation
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_extreme_values(dtype, activation):
    """One value for each call, because in a longer tensor PyTorch's gelu overflows at 3e38 and is NaN at infinity."""
    for value in (0.0, 1e-38, 80, 100, 2e19, 3e38, math.inf, math.nan):
        for gate in (torch.tensor([value], dtype=dtype), torch.tensor([-value], dtype=dtype)):
            up = torch.full_like(gate, 0.5)
            torch.testing.assert_close(*both(gate, up, up, activation), equal_nan=True, rtol=1e-5, atol=1e-30)


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_gradients(dtype, activation):
    gate = torch.tensor([-3.0, 0.0, 2.0], dtype=dtype)
    ours, theirs = both(gate, torch.ones_like(gate), torch.full_like(gate, math.inf), activation)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@every_activation
def test_a_gradient_of_one_number_in_all_places(activation):
    gate, up, grad = torch.randn(6, 4).t(), torch.randn(8, 12)[::2, ::2], torch.randn(()).expand(4, 6)
    ours, theirs = both(gate, up, grad, activation)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    assert all(one.is_contiguous() for one in ours[1:])
