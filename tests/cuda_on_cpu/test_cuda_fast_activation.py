"""The activations of 16-bit tensors on CUDA, for every gate, with the largest errors that the hardware may make.

A result depends on one approximate exponential and one approximate reciprocal, and on each of them monotonically. The
largest errors of a result are therefore at the corners of their error bounds. The truth is computed in float64.
"""

import itertools
import math

import pytest
import torch
from ops.cases import TRUTH
from support.inside import ACTIVATIONS, reference, reference_backward

DTYPES = (torch.bfloat16, torch.float16)
# Of the relative error of both instructions: two units in the last place beside the correctly rounded result.
BOUND = 2.5 * 2.0**-23
# A smaller result may be 0. The instructions have no subnormal results, and e^-x overflows where PyTorch's does.
LEAST = 2.0**-120


def steps(a, b):
    """How many numbers of the type lie between a and b, plus 1 if they differ."""

    def place(t):
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


def results(runner, activation, dtype):
    """act(gate) and act'(gate) of every gate, at every corner."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # every number
    one = torch.ones_like(gate)
    runner.configure(max_blocks=1)
    for corner in itertools.product((-BOUND, BOUND), repeat=2):
        runner.approximate(*corner)
        yield gate, runner.act_mul(gate, one, activation), runner.act_mul_backward(one, gate, one, activation)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_within_one_unit_in_the_last_place_of_the_truth(runner, activation, dtype):
    """The slopes of gelu and gelu_tanh in float16 may be three away where they cross 0, at gates of -0.752 and -0.753."""
    for gate, *ours in results(runner, activation, dtype):
        sensible = gate.isfinite() & (gate.abs() < 1e18)  # beyond, PyTorch's own slope of gelu_tanh is NaN
        for which, (mine, exact) in enumerate(zip(ours, TRUTH[activation](gate.double()))):
            normal = sensible & (exact.abs() >= LEAST)
            far = steps(mine, exact.to(dtype))[normal]
            if which == 1 and dtype is torch.float16 and activation in ("gelu", "gelu_tanh"):
                assert all(-0.754 < one < -0.751 for one in gate[normal][far > 1].tolist())
            else:
                assert far.max() <= 1
            assert far.max() <= 3 and (far > 0).sum() <= 70  # of 63,000
            assert ((mine.double() - exact).abs()[sensible & ~normal] < LEAST).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_is_within_one_unit_in_the_last_place_of_pytorch(runner, dtype):
    for gate, value, slope in results(runner, "silu", dtype):
        one = torch.ones_like(gate)
        for mine, theirs in (
            (value, reference(gate, one, "silu")),
            (slope, reference_backward(one, gate, one, "silu")[0]),
        ):
            assert torch.equal(mine.isnan(), theirs.isnan())
            assert steps(mine, theirs)[~theirs.isnan() & (theirs.abs().double() >= LEAST)].max() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_and_nan(runner, activation, dtype):
    gate, up = torch.tensor([math.inf, -math.inf, math.nan, 1.0, 1.0], dtype=dtype), torch.ones(5, dtype=dtype)
    up[3], up[4] = math.inf, math.nan
    out = runner.act_mul(gate, up, activation)
    of_minus_infinity = 0.0 if activation == "relu" else math.nan  # -inf * 0
    expected = torch.tensor([math.inf, of_minus_infinity, math.nan, math.inf, math.nan], dtype=dtype)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    of_gate, of_up = runner.act_mul_backward(torch.ones_like(up), gate, up, activation)
    assert of_gate[:3].tolist() == [1, 0, 1] if activation == "relu" else of_gate[:3].isnan().all()  # inf * 0
    assert of_gate[3].isinf() and of_gate[4].isnan()
    torch.testing.assert_close(of_up[:3], expected[:3], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_result_does_not_depend_on_its_place(runner, activation, dtype):
    """Elements are computed in packs, in pairs or alone. `place` moves the same elements from one to the other."""
    memory = [torch.randn(80).to(dtype) for _ in range(3)]
    grad, gate, up = (values.clone() for values in memory)  # aligned to 16 bytes
    expected = runner.act_mul(gate, up, activation), *runner.act_mul_backward(grad, gate, up, activation)
    for place in (1, 2, 8, 79):
        grad, gate, up = (values[place:] for values in memory)
        moved = runner.act_mul(gate, up, activation), *runner.act_mul_backward(grad, gate, up, activation)
        assert all(torch.equal(a, b[place:]) for a, b in zip(moved, expected))
