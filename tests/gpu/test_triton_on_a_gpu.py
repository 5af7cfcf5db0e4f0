"""Triton's kernels on a real GPU, next to the CUDA kernels of the same ops: the same numbers, and no wait of the host."""

from importlib import import_module

import pytest
import torch
from support.tolerances import GEMM

from s2ft.ops import pack_adapters

pytestmark = pytest.mark.cuda
D = "cuda"


@pytest.fixture(scope="module")
def triton():
    pytest.importorskip("triton")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton needs compute capability 8.0")
    return {name: import_module(f"s2ft.ops._triton.{name}") for name in ("act_mul", "multi_adapter_linear")}


def check(got, expected, dtype):
    rtol, atol = GEMM[dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", ((1, 7), (33, 176), (4096, 14336)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh", "relu"))
def test_act_mul(activation, dtype, size, triton):
    reference = import_module("s2ft.ops.act_mul")
    gate, up, grad = (torch.randn(size, device=D).to(dtype) for _ in range(3))
    check(triton["act_mul"].act_mul(gate, up, activation), reference.reference(gate, up, activation), dtype)
    got = triton["act_mul"].act_mul_backward(grad, gate, up, activation)
    for ours, theirs in zip(got, reference.reference_backward(grad, gate, up, activation)):
        check(ours, theirs, dtype)


@pytest.mark.parametrize("count,tokens", ((1, 1), (8, 1), (64, 1), (4, 17), (3, 512)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("dim", (0, 1))
def test_multi_adapter_linear(dim, dtype, count, tokens, triton):
    width, units = 2048, 48
    shape = (units, width) if dim == 0 else (width, units)
    adapters = [
        (torch.randperm(width, device=D)[:units], (torch.randn(*shape, device=D) / 64).to(dtype)) for _ in range(count)
    ]
    bank, names = pack_adapters(adapters, dim), torch.randint(-1, count, (count,), device=D)
    x, y = (torch.randn(count, tokens, width, device=D).to(dtype) for _ in range(2))
    op = triton["multi_adapter_linear"].multi_adapter_linear
    op(x, y, *bank, names, dim)  # the first call compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = op(x, y, *bank, names, dim)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = torch.ops.s2ft.multi_adapter_linear(x.double(), y.double(), bank[0].double(), *bank[1:], names, dim)
    check(got.double(), expected, dtype)
