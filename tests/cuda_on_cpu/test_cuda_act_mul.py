"""The CUDA kernels of act_mul, run on the CPU, give PyTorch's numbers."""

import pytest
import torch
from ops.cases import DTYPES
from support.inside import ACTIVATIONS, reference, reference_backward
from support.tolerances import GEMM

SIZES = (0, 1, 8, 37, 256 * 8 + 5, 3000)  # packs of 16 bytes, remainders, and more than one block of both
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def check(runner, activation, gate, up, grad, out=None, outs=None):
    ours = runner.act_mul(gate, up, activation, out), *runner.act_mul_backward(grad, gate, up, activation, outs)
    theirs = reference(gate, up, activation), *reference_backward(grad, gate, up, activation)
    rtol, atol = GEMM[gate.dtype]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


def shifted(values, offset):
    """A copy of values whose first element is `offset` elements behind an address divisible by 16."""
    memory = torch.full((values.numel() + offset,), float("nan"), dtype=values.dtype)
    assert memory.data_ptr() % 16 == 0
    memory[offset:] = values
    return memory[offset:]


def tensors(size, dtype, offsets=(0, 0, 0)):
    """gate, up and grad."""
    return [shifted((torch.randn(size).double() * scale).to(dtype), by) for scale, by in zip((5, 1, 1), offsets)]


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size(runner, activation, dtype):
    for size in SIZES:
        for seed, max_blocks in enumerate((0, 1, 3)):
            runner.configure(seed, max_blocks=max_blocks)
            check(runner, activation, *tensors(size, dtype))


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_tensors(runner, activation, dtype):
    """The kernel may read 16 bytes at once only if every tensor is aligned."""
    runner.configure(max_blocks=2)
    for which in range(5):
        offsets = [int(k == which) for k in range(5)]
        out, *outs = (shifted(torch.empty(600, dtype=dtype), offset) for offset in offsets[2:])
        check(runner, activation, *tensors(600, dtype, offsets), out, outs)


@every_activation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns, gap", ((16, 0), (16, 8), (16, 3), (17, 0), (1, 1), (2048, 16)))
def test_halves_of_one_product(runner, activation, dtype, columns, gap):
    """Packs are read from rows that begin at a pack, else single elements; other rows have gaps of their own."""
    both = torch.randn(9, 2 * columns + gap).to(dtype)
    gate, up = both[:, :columns], both[:, columns + gap :]
    gate *= 5
    grad = torch.randn(9, columns).to(dtype)
    for max_blocks in (0, 1, 3):
        runner.configure(max_blocks=max_blocks)
        check(runner, activation, gate, up, grad)
        check(runner, activation, gate, up.contiguous(), grad)


@every_activation
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_gate(runner, activation, dtype):
    """Infinity is left out, because PyTorch's gelu has two different results for it."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[~gate.isinf() & ~(gate.abs() > 1e19)]
    half = torch.full_like(gate, 0.5)
    check(runner, activation, gate, half, half)
