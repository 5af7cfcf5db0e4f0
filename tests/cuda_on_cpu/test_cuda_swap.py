"""The kernel of swap_ against PyTorch."""
import itertools

import pytest
import torch

CASES = [(shape, dim) for shape in ((9,), (5, 7), (24, 40), (3, 5, 7), (4, 8, 16)) for dim in range(len(shape))]
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


def strided(values, step):
    """values with `step` elements from one to the next in every dimension."""
    memory = torch.zeros([step * size for size in values.shape], dtype=values.dtype)
    view = memory[tuple(slice(None, None, step) for _ in values.shape)]
    view.copy_(values)
    return view


@pytest.mark.parametrize("shape,dim", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exchange_and_back(runner, shape, dim, dtype):
    torch.manual_seed(0)
    original = torch.randint(0, 200, shape).to(dtype)
    for n, steps in itertools.product((0, 1, shape[dim]), ((1, 1), (2, 1), (1, 2))):
        index = torch.randperm(shape[dim])[:n]
        mine = torch.randint(0, 200, (*shape[:dim], n, *shape[dim + 1:])).to(dtype)
        weight, values = strided(original, steps[0]), strided(mine, steps[1])
        runner.configure(n, max_blocks=2)
        runner.exchange(weight, index, values, dim)
        assert torch.equal(values, original.index_select(dim, index))
        assert torch.equal(weight, original.index_copy(dim, index, mine))
        runner.exchange(weight, index, values, dim)
        assert torch.equal(weight, original) and torch.equal(values, mine)


@pytest.mark.parametrize("dim", (0, 1))
def test_units_out_of_range_are_skipped(runner, dim):
    original, index = torch.randn(6, 8), torch.tensor([2, 99, -1])
    mine = torch.randn((3, 8) if dim == 0 else (6, 3))
    weight, values = original.clone(), mine.clone()
    runner.exchange(weight, index, values, dim)
    expected = original.clone()
    expected.select(dim, 2).copy_(mine.select(dim, 0))
    assert torch.equal(weight, expected)
    assert torch.equal(values.narrow(dim, 1, 2), mine.narrow(dim, 1, 2))


@pytest.mark.parametrize("offset", (0, 1, 2))
def test_misaligned_values(runner, offset):
    original, memory = torch.randn(6, 8), torch.randn(16 + offset)
    weight, values = original.clone(), memory[offset:].view(2, 8)
    mine = values.clone()
    runner.exchange(weight, torch.tensor([5, 1]), values, 0)
    assert torch.equal(values, original[[5, 1]]) and torch.equal(weight[[5, 1]], mine)
