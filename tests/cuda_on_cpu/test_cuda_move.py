"""The CUDA kernels of permute_, swap_ and scatter_add_, run on the CPU, give PyTorch's numbers."""

import itertools

import pytest
import torch

from s2ft.ops.scatter_add_ import reference

CASES = [(shape, dim) for shape in ((9,), (5, 7), (24, 40), (3, 5, 7), (4, 8, 16)) for dim in range(len(shape))]
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


def strided(values, step):
    """A copy of values whose neighbours are `step` elements apart in every dimension."""
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
        mine = torch.randint(0, 200, (*shape[:dim], n, *shape[dim + 1 :])).to(dtype)
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


@pytest.mark.parametrize("shape,dim", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_permute_and_back(runner, shape, dim, dtype):
    """All lines at once, or one or three at a time. Lines of one round must not be written in another round."""
    torch.manual_seed(0)
    original = torch.randint(0, 200, shape).to(dtype)
    half = torch.arange(shape[dim])
    half[: shape[dim] // 2] = half[: shape[dim] // 2].flip(0)
    for order, at_once, step in itertools.product((torch.randperm(shape[dim]), half), (None, 1, 3), (1, 2)):
        weight = strided(original, step)
        runner.configure(shape[dim], max_blocks=2)
        runner.permute(weight, order, dim, at_once)
        assert torch.equal(weight, original.index_select(dim, order))
        runner.permute(weight, order.argsort(), dim, at_once)
        assert torch.equal(weight, original)


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape,dim", CASES, ids=str)
@pytest.mark.parametrize("dtypes", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_scatter_add(runner, shape, dim, dtypes):
    """Several parts share units. They are added in their order, and the sum is rounded once, under every schedule."""
    torch.manual_seed(0)
    dtype, delta_dtype = dtypes
    wide = torch.promote_types(torch.promote_types(dtype, delta_dtype), torch.float32)
    original, n = torch.randn(shape).to(dtype), shape[dim]
    for sizes, step, seed in itertools.product(((n,), (n // 2, 0, n, n // 2 + 1)), (1, 2), (0, 1)):
        index = [torch.randperm(n)[:size] for size in sizes]
        delta = [torch.randn(*shape[:dim], size, *shape[dim + 1 :]).to(delta_dtype) for size in sizes]
        alpha = [(-0.7) ** j for j in range(len(sizes))]
        expected = original.to(wide)
        for i, d, a in zip(index, delta, alpha):
            expected = expected.index_copy(dim, i, expected.index_select(dim, i) + a * d.to(wide))
        weight = strided(original, step)
        runner.configure(seed, max_blocks=2)
        replaced = [strided(torch.zeros(d.shape, dtype=dtype), step) for d in delta] if seed else ()
        runner.scatter_add(weight, index, [strided(d, step) for d in delta], dim, alpha, replaced)
        assert torch.equal(weight, expected.to(dtype))
        assert all(torch.equal(old, original.index_select(dim, i)) for old, i in zip(replaced, index))


@pytest.mark.parametrize("count", (2, 16, 17, 33, 70))
@pytest.mark.parametrize("shape,dim", (((6, 8), 0), ((6, 8), 1), ((5,), 0)), ids=str)
def test_scatter_add_of_any_number_of_parts(runner, shape, dim, count):
    """Every sum is rounded once, and `replaced` is the base. Both equal the reference bit for bit."""
    torch.manual_seed(count)
    original, n = torch.randn(shape).bfloat16(), shape[dim]
    index = [torch.randperm(n)[: j % (n + 1)] for j in range(count)]
    delta = [torch.randn(*shape[:dim], len(i), *shape[dim + 1 :]) for i in index]
    alpha = [1 - j / count for j in range(count)]
    kept = [torch.zeros_like(d, dtype=original.dtype) for d in delta]
    expected, expected_kept = original.clone(), [torch.zeros_like(old) for old in kept]
    reference(expected, index, delta, dim, alpha, expected_kept)
    weight = original.clone()
    runner.configure(count, max_blocks=2)
    runner.scatter_add(weight, index, delta, dim, alpha, kept)
    assert torch.equal(weight, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, expected_kept))


@pytest.mark.parametrize("dim", (0, 1))
def test_scatter_add_skips_units_out_of_range(runner, dim):
    original, index = torch.randn(6, 8), [torch.tensor([99, 2]), torch.tensor([-1, 2])]
    delta = [torch.ones((2, 8) if dim == 0 else (6, 2)) for _ in range(2)]
    weight = original.clone()
    runner.scatter_add(weight, index, delta, dim, [1.0, 2.0])
    expected = original.clone()
    expected.select(dim, 2).add_(1).add_(2)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("offset", (0, 1, 2))
def test_misaligned_delta(runner, offset):
    weight, delta = torch.zeros(6, 8), torch.randn(16 + offset)[offset:].view(2, 8)
    runner.scatter_add(weight, [torch.tensor([5, 1])], [delta], 0, [1.0])
    assert torch.equal(weight[[5, 1]], delta) and not weight[[0, 2, 3, 4]].any()
