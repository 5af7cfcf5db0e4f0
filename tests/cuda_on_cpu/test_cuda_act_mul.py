"""The CUDA kernels of act_mul, run on the CPU, give PyTorch's numbers."""

import pytest
import torch
from support.tolerances import GEMM

from s2ft.ops.act_mul import ACTIVATIONS, reference, reference_backward

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 8, 37, 256 * 8 + 5, 3000)  # packs of 16 bytes, remainders, and more than one block of both


def check(ours, theirs):
    rtol, atol = GEMM[ours.dtype]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def shifted(values, offset):
    """A copy of values whose first element is `offset` elements behind an address divisible by 16."""
    memory = torch.full((values.numel() + offset,), float("nan"), dtype=values.dtype)
    assert memory.data_ptr() % 16 == 0
    memory[offset:] = values
    return memory[offset:]


def random(size, dtype, scale=1, offset=0):
    return shifted((torch.randn(size, dtype=torch.float64) * scale).to(dtype), offset)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(runner, activation, dtype):
    torch.manual_seed(0)
    for size in SIZES:
        for seed, max_blocks in enumerate((0, 1, 3)):
            runner.configure(seed, max_blocks=max_blocks)
            gate, up, grad = random(size, dtype, 5), random(size, dtype), random(size, dtype)
            check(runner.act_mul(gate, up, activation), reference(gate, up, activation))
            for ours, theirs in zip(
                runner.act_mul_backward(grad, gate, up, activation), reference_backward(grad, gate, up, activation)
            ):
                check(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(runner, activation, dtype):
    """The kernel may read 16 bytes at once only if every tensor is aligned."""
    torch.manual_seed(0)
    runner.configure(max_blocks=2)
    for which in range(5):
        offsets = [int(k == which) for k in range(5)]
        gate, up, grad = (random(600, dtype, scale, offset) for scale, offset in zip((5, 1, 1), offsets))
        outs = [shifted(torch.empty(600, dtype=dtype), offset) for offset in offsets[3:]]
        check(runner.act_mul(gate, up, activation, outs[0]), reference(gate, up, activation))
        for ours, theirs in zip(
            runner.act_mul_backward(grad, gate, up, activation, outs), reference_backward(grad, gate, up, activation)
        ):
            check(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_gate(runner, activation, dtype):
    """Infinity is left out, because PyTorch's gelu has two different results for it."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[~gate.isinf() & ~(gate.abs() > 1e19)]
    up = torch.full_like(gate, 0.5)
    check(runner.act_mul(gate, up, activation), reference(gate, up, activation))
    for ours, theirs in zip(
        runner.act_mul_backward(up, gate, up, activation), reference_backward(up, gate, up, activation)
    ):
        check(ours, theirs)
