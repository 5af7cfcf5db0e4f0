"""The CUDA kernels of permute_, swap_ and scatter_add_, run on the CPU, give PyTorch's numbers."""

import itertools

import pytest
import torch
from ops.cases import DTYPES, scattered
from support.pairs import in_turn

CASES = [(shape, dim) for shape in ((9,), (5, 7), (24, 40), (3, 5, 7), (4, 8, 16)) for dim in range(len(shape))]
each_case_with_a_dtype = pytest.mark.parametrize(
    "case, dtype", in_turn(CASES, (torch.uint8, torch.bfloat16, torch.float32, torch.float64)), ids=str
)


def strided(values, step):
    """A copy of values whose neighbours are `step` elements apart in every dimension."""
    memory = torch.zeros([step * size for size in values.shape], dtype=values.dtype)
    view = memory[tuple(slice(None, None, step) for _ in values.shape)]
    view.copy_(values)
    return view


@each_case_with_a_dtype
def test_exchange_and_back(runner, case, dtype):
    shape, dim = case
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
    assert torch.equal(weight, expected) and torch.equal(values.narrow(dim, 1, 2), mine.narrow(dim, 1, 2))


@pytest.mark.parametrize("offset", (0, 1, 2))
def test_misaligned_values(runner, offset):
    original, memory = torch.randn(6, 8), torch.randn(16 + offset)
    weight, values = original.clone(), memory[offset:].view(2, 8)
    mine = values.clone()
    runner.exchange(weight, torch.tensor([5, 1]), values, 0)
    assert torch.equal(values, original[[5, 1]]) and torch.equal(weight[[5, 1]], mine)


@each_case_with_a_dtype
def test_permute_and_back(runner, case, dtype):
    """All lines at once, or one or three at a time. Lines of one round must not be written in another round."""
    shape, dim = case
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


@pytest.mark.parametrize("dtypes, case", in_turn(itertools.product(DTYPES, DTYPES), CASES), ids=str)
def test_scatter_add(runner, dtypes, case):
    """Several parts share units. They are added in their order, and the sum is rounded once, under every schedule."""
    (shape, dim), n = case, case[0][case[1]]
    for counts, step, seed in itertools.product(((n,), (n // 2, 0, n, n // 2 + 1)), (1, 2), (0, 1)):
        alphas = [(-0.7) ** j for j in range(len(counts))]
        case = scattered(dim, shape, counts, alphas, *dtypes)
        ((_, (weight, index, delta, *_, replaced)),) = case.registered
        expected = case.results(case.definition)
        weight, *replaced = (strided(tensor, step) for tensor in (weight, *replaced))
        runner.configure(seed, max_blocks=2)
        runner.scatter_add(weight, index, [strided(d, step) for d in delta], dim, alphas, replaced if seed else ())
        assert all(map(torch.equal, (weight, *replaced), expected if seed else expected[:1]))


@pytest.mark.parametrize("count", (2, 16, 17, 33, 70))
@pytest.mark.parametrize("shape,dim", (((6, 8), 0), ((6, 8), 1), ((5,), 0)), ids=str)
def test_scatter_add_of_any_number_of_parts(runner, shape, dim, count):
    """Every sum is rounded once, and `replaced` is the base. Both equal the reference bit for bit."""
    counts, alphas = [j % (shape[dim] + 1) for j in range(count)], [1 - j / count for j in range(count)]
    case = scattered(dim, shape, counts, alphas, torch.bfloat16, torch.float32)
    ((_, (weight, index, delta, *_, replaced)),) = case.registered
    expected = case.results()
    runner.configure(count, max_blocks=2)
    runner.scatter_add(weight, index, delta, dim, alphas, replaced)
    assert all(map(torch.equal, (weight, *replaced), expected))


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
