"""The Triton kernels of act_mul give PyTorch's numbers."""

import math

import pytest
import torch
from support import triton_device
from support.tolerances import GEMM

from s2ft.ops.act_mul import ACTIVATIONS, reference, reference_backward

pytestmark = triton_device.marks

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 8, 37, 1024, 2 * 1024 + 5)  # a part of a block, one, several and a remainder

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


@pytest.fixture(scope="module")
def kernels():
    return triton_device.kernels()


def random(size, dtype, scale=1):
    return (torch.randn(size, dtype=torch.float64) * scale).to(dtype)


def check(kernels, grad, gate, up, activation, **tolerance):
    """Forward and backward against the references in the tensors' dtype and in float64."""
    tensors = [t.to(triton_device.DEVICE) for t in (grad, gate, up)]
    ours = (kernels["act_mul"](*tensors[1:], activation), *kernels["act_mul_backward"](*tensors, activation))
    for d, g, u in ((grad, gate, up), (grad.double(), gate.double(), up.double())):
        theirs = (reference(g, u, activation), *reference_backward(d, g, u, activation))
        rtol, atol = GEMM[gate.dtype]
        tolerance = tolerance or dict(rtol=rtol, atol=atol)
        for got, expected in zip(ours, theirs):
            assert got.is_contiguous() and got.shape == gate.shape and got.dtype == gate.dtype
            torch.testing.assert_close(got.cpu(), expected.to(gate.dtype), equal_nan=True, **tolerance)


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(kernels, activation, dtype):
    for size in SIZES:
        check(kernels, random(size, dtype), random(size, dtype, 5), random(size, dtype), activation)


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernels, activation, dtype):
    gate, up = random((6, 4), dtype).t(), random((8, 12), dtype)[::2, ::2]
    check(kernels, random((), dtype).expand(4, 6), gate, up, activation)
    assert kernels["act_mul"](*[t.to(triton_device.DEVICE) for t in (gate[0, 0], up[0, 0])], activation).shape == ()


@every_activation
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_gate(kernels, activation, dtype):
    """Infinity is left out, because PyTorch's gelu has two different results for it."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[~gate.isinf() & ~(gate.abs() > 1e19)]
    if triton_device.INTERPRETED:  # it reads a subnormal bfloat16 that is a power of two as zero
        gate = gate[(gate == 0) | gate.isnan() | (gate.abs() >= torch.finfo(dtype).tiny)]
    half = torch.full_like(gate, 0.5)
    tensors = [t.to(triton_device.DEVICE) for t in (half, gate, half)]
    ours = (kernels["act_mul"](*tensors[1:], activation), *kernels["act_mul_backward"](*tensors, activation))
    theirs = (reference(gate, half, activation), *reference_backward(half, gate, half, activation))
    rtol, atol = GEMM[dtype]
    for got, expected in zip(ours, theirs):
        torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=atol, equal_nan=True)


@every_activation
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_extreme_values(kernels, activation, dtype):
    """One value for each call, because in a longer tensor PyTorch's gelu overflows at 3e38 and is NaN at infinity."""
    for value in (0.0, 1e-38, 80, 100, 2e19, 3e38, math.inf, math.nan):
        for gate in (torch.tensor([value], dtype=dtype), torch.tensor([-value], dtype=dtype)):
            half = torch.full_like(gate, 0.5)
            tensors = [t.to(triton_device.DEVICE) for t in (half, gate, half)]
            ours = (kernels["act_mul"](*tensors[1:], activation), *kernels["act_mul_backward"](*tensors, activation))
            theirs = (reference(gate, half, activation), *reference_backward(half, gate, half, activation))
            for got, expected in zip(ours, theirs):
                torch.testing.assert_close(got.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-30)


@every_activation
def test_float32_keeps_its_digits_in_the_lower_tail(kernels, activation):
    gate = torch.linspace(-12, 12, 5000)
    exact = {
        "gelu": lambda g: g * 0.5 * torch.special.erfc(-g / math.sqrt(2)),
        "gelu_tanh": lambda g: g * torch.sigmoid(math.sqrt(8 / math.pi) * (g + 0.044715 * g**3)),
    }.get(activation, ACTIVATIONS[activation].function)
    ours = kernels["act_mul"](*[t.to(triton_device.DEVICE) for t in (gate, torch.ones_like(gate))], activation)
    rtol = 2e-5 if activation == "gelu_tanh" else 5e-6  # the hardware's exp is not exact to the last digit
    torch.testing.assert_close(ours.cpu().double(), exact(gate.double()), rtol=rtol, atol=1e-36)
