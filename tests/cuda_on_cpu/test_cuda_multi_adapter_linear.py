"""The CUDA kernels of multi_adapter_linear, run on the CPU, equal its definition."""

import pytest
import torch
from ops.cases import DTYPES
from support.inside import multi_adapter_linear_reference as reference
from support.tolerances import GEMM

from s2ft.ops import pack_adapters


def bank_of(dim, dtype, inputs, outputs, sizes):
    size = (outputs, inputs)[dim]
    return pack_adapters(
        [(torch.randperm(size)[:n], torch.randn((n, inputs) if dim == 0 else (outputs, n)).to(dtype)) for n in sizes],
        dim,
    )


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", (1, 3, 9))  # decode, less than a tile, several tiles and a remainder
def test_adds_each_sequences_adapter(runner, dim, dtype, tokens):
    rtol, atol = GEMM[dtype]
    # The adapters have more units than a block holds at once, none, one and a few. The widths are whole packs, odd
    # numbers, and more than one strip.
    for seed, (inputs, outputs) in enumerate(((48, 56), (37, 45), (64, 1088))):
        bank = bank_of(dim, dtype, inputs, outputs, (34, 0, 1, 7))
        x, y = torch.randn(6, tokens, inputs).to(dtype), torch.randn(6, tokens, outputs).to(dtype)
        adapter = torch.tensor([3, 0, -1, 1, 0, 2])
        runner.configure(seed)
        out = runner.add_adapters(x, y, *bank, adapter, dim)
        expected = reference(x, y, *bank, adapter, dim)
        torch.testing.assert_close(out, expected, rtol=rtol, atol=atol * expected.abs().max().item())
        assert torch.equal(out[[2, 3]], y[[2, 3]])


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tokens,inputs,outputs", ((17, 72, 264), (64, 64, 40), (70, 200, 520)))
def test_many_tokens(runner, dim, dtype, tokens, inputs, outputs):
    """They run on tensor cores: less than a tile of tokens, a whole one, and more; whole tiles of the rest and parts."""
    rtol, atol = GEMM[dtype]
    bank = bank_of(dim, dtype, inputs, outputs, (34, 0, 1, 70 if min(inputs, outputs) > 70 else 32))
    x, y = torch.randn(4, tokens, inputs).to(dtype), torch.randn(4, tokens, outputs).to(dtype)
    adapter = torch.tensor([3, -1, 0, 2])
    runner.configure(tokens)
    out = runner.add_adapters(x, y, *bank, adapter, dim)
    expected = reference(x.double(), y.double(), bank[0].double(), *bank[1:], adapter, dim)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol * expected.abs().max().item())
    assert torch.equal(out[1], y[1])
    # A sequence gives the same numbers alone.
    assert torch.equal(runner.add_adapters(x[2:3], y[2:3], *bank, adapter[2:3], dim), out[2:3])


@pytest.mark.parametrize("dim", (0, 1))
def test_many_tokens_with_units_out_of_range(runner, dim):
    values, index, offsets = bank_of(dim, torch.bfloat16, 16, 16, (6,))
    inside = torch.tensor([True, False, False, True, True, True])
    index = torch.where(inside, torch.tensor([3, 99, -1, 0, 8, 15]), torch.tensor([0, 99, -1, 0, 0, 0]))
    x, y = torch.randn(2, 20, 16).bfloat16(), torch.randn(2, 20, 16).bfloat16()
    out = runner.add_adapters(x, y, values, index, offsets, torch.tensor([0, 5]), dim)
    few = pack_adapters([(index[inside], values[inside] if dim == 0 else values[inside].t())], dim)
    expected = reference(x, y, *few, torch.tensor([0, -1]), dim)
    torch.testing.assert_close(out, expected, rtol=GEMM[torch.bfloat16][0], atol=GEMM[torch.bfloat16][1] * 4)
    assert torch.equal(out[1], y[1])


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("offset", (1, 3))
def test_misaligned_x_and_y(runner, dim, offset):
    bank = bank_of(dim, torch.float32, 16, 16, (5, 2))
    x, y = (torch.randn(3 * 16 + offset)[offset:].view(3, 1, 16) for _ in range(2))
    adapter = torch.tensor([0, 1, 0])
    torch.testing.assert_close(runner.add_adapters(x, y, *bank, adapter, dim), reference(x, y, *bank, adapter, dim))


@pytest.mark.parametrize("dim", (0, 1))
def test_units_and_adapters_out_of_range_add_nothing(runner, dim):
    values, index, offsets = bank_of(dim, torch.float32, 16, 16, (3, 2))
    index[:] = torch.tensor([99, 4, -1, 2, 7])
    x, y = torch.randn(4, 1, 16), torch.randn(4, 1, 16)
    out = runner.add_adapters(x, y, values, index, offsets, torch.tensor([2, 0, -7, 1]), dim)
    assert torch.equal(out[[0, 2]], y[[0, 2]])  # no such adapter
    one = pack_adapters([(index[1:2], values[1:2] if dim == 0 else values[1:2].t())], dim)
    torch.testing.assert_close(out[1:2], reference(x[1:2], y[1:2], *one, torch.tensor([0]), dim))


@pytest.mark.parametrize("offsets", ([0, 99], [-1, 3], [3, 0]), ids=str)
def test_offsets_out_of_range_add_nothing(runner, offsets):
    values, index, _ = bank_of(1, torch.float32, 16, 16, (3,))
    x, y = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    assert torch.equal(runner.add_adapters(x, y, values, index, torch.tensor(offsets), torch.tensor([0]), 1), y)
