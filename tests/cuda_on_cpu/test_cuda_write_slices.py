"""The CUDA kernel of write_slices_, run on the CPU."""

import pytest
import torch
from ops.cases import DTYPES

# Rows and columns: one, odd, a multiple of the 16-byte width in every dtype, and beyond one block.
SHAPES = ((1, 1), (5, 7), (3, 16), (24, 40), (33, 129))
LAYOUTS = {  # the shape of the memory, and the view of it
    "dense": (lambda rows, columns: (rows, columns), lambda memory: memory),
    "transposed": (lambda rows, columns: (columns, rows), torch.t),
    "strided": (lambda rows, columns: (2 * rows, 3 * columns), lambda memory: memory[::2, ::3]),
    # the rows are not aligned to 16 bytes
    "off by one": (lambda rows, columns: (rows, columns + 1), lambda memory: memory[:, 1:]),
}
UNTOUCHED = 42.0


def place(values, layout):
    """Returns a view with the values in the given layout, and the whole memory of that view."""
    shape, view = LAYOUTS[layout]
    memory = torch.full(shape(*values.shape), UNTOUCHED, dtype=values.dtype)
    view(memory).copy_(values)
    return view(memory), memory


def random(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def delta_shape(weight, n, dim):
    return (n, weight.shape[1]) if dim == 0 else (weight.shape[0], n)


def unit_choices(size):
    """Slices and indices: empty, aligned, misaligned, scattered, and all units."""
    yield 0, 0
    yield 0, size
    if size > 2:
        yield 1, size - 2
        yield torch.randperm(size)[: size // 2], size // 2
    if size >= 16:
        yield 8, 8
    yield torch.randperm(size), size


def effective(base, delta):
    return (base + delta).to(base.dtype)


def check(runner, values, layout, delta, units, n, dim):
    index = units if isinstance(units, torch.Tensor) else torch.arange(units, units + n)
    weight, memory = place(values, layout)
    before, base = memory.clone(), values.index_select(dim, index).contiguous()

    runner.write_slices((weight, base, delta, units, dim))
    assert torch.equal(weight, values.index_copy(dim, index, effective(base, delta)))
    weight.copy_(values)
    assert torch.equal(memory, before)  # nothing was written between the elements of the weight


def test_many_slices_in_one_call(runner):
    """More than one launch has room for, of several dtypes, the shapes of a model."""
    runner.configure(1, max_blocks=2)
    given, expected = [], []
    for number in range(75):
        dtype, dim = DTYPES[number // 20], number % 2
        values, n = random((16 + number, 48), dtype), 1 + number % 16
        units = torch.randperm(values.shape[dim])[:n] if number % 3 else number % 5
        index = units if isinstance(units, torch.Tensor) else torch.arange(units, units + n)
        base = values.index_select(dim, index).contiguous()
        delta = random(base.shape, torch.float32 if number % 7 else dtype)
        given.append((values.clone(), base, delta, units, dim))
        expected.append(values.index_copy(dim, index, effective(base, delta)))
    runner.write_slices(*given)
    assert all(torch.equal(one[0], other) for one, other in zip(given, expected))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", (0, 1))
def test_every_layout_and_choice_of_units(runner, layout, shape, dim):
    for dtype in DTYPES:
        values = random(shape, dtype)
        for seed, (units, n) in enumerate(unit_choices(shape[dim])):
            runner.configure(seed, max_blocks=2)
            check(runner, values, layout, random(delta_shape(values, n, dim), dtype), units, n, dim)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delta_dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes_rounds_like_pytorch(runner, weight_dtype, delta_dtype):
    for scale in (1e-8, 1e-3, 1.0, 3e4):
        values, delta = random((16, 64), weight_dtype), random((16, 64), torch.float64).mul(scale).to(delta_dtype)
        check(runner, values, "dense", delta, 0, 16, 0)
        check(runner, values, "off by one", delta, 0, 16, 0)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_16_bit_pattern(runner, dtype):
    base = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).reshape(256, 256).view(dtype)
    weight, delta = torch.zeros(256, 256, dtype=dtype), torch.ones(256, 256)
    runner.write_slices((weight, base, delta, 0, 0))
    expected = effective(base, delta)
    assert torch.equal(weight.isnan(), expected.isnan())
    assert torch.equal(weight.nan_to_num(1, 2, 3), expected.nan_to_num(1, 2, 3))


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("misaligned", ("base", "delta"))
def test_misaligned_buffers(runner, dim, misaligned):
    """The fast path needs all pointers to be aligned, not only that of the weight."""

    def buffer(name, dtype):
        return random((256 + 8 + 1,), dtype)[name == misaligned :][: shape[0] * shape[1]].view(shape)

    weight = random((8, 32), torch.bfloat16)
    shape = delta_shape(weight, 8, dim)
    base, delta = buffer("base", torch.bfloat16), buffer("delta", torch.float32)
    runner.write_slices((weight, base, delta, 0, dim))
    assert torch.equal(weight.narrow(dim, 0, 8), effective(base, delta))


@pytest.mark.parametrize("dim", (0, 1))
def test_units_out_of_range_are_skipped(runner, dim):
    values = random((8, 8), torch.float32)
    weight, memory = place(values, "strided")
    index, kept = torch.tensor([3, 8, -1, 2**40, 5]), torch.tensor([3, 5])
    base, delta = (random(delta_shape(values, 5, dim), torch.float32) for _ in range(2))
    runner.write_slices((weight, base, delta, index, dim))
    sums = effective(base, delta).index_select(dim, torch.tensor([0, 4]))
    assert torch.equal(weight, values.index_copy(dim, kept, sums)) and (memory[1::2] == UNTOUCHED).all()


@pytest.mark.parametrize("dim", (0, 1))
def test_a_slice_beyond_the_weight_is_cut_at_its_end(runner, dim):
    values = random((8, 8), torch.float32)
    weight, ones = values.clone(), torch.ones(delta_shape(values, 4, dim))
    runner.write_slices((weight.narrow(dim, 0, 6), ones, ones, 4, dim))
    assert torch.equal(weight.narrow(dim, 6, 2), values.narrow(dim, 6, 2))


# Whole packs of 16 bytes in every dtype: heads in order and not, heads that start between two packs, runs that are
# shorter than a pack, neighbours in descending order, and a pack that is one run but for its last column.
RUNS = (
    [*range(16, 32), *range(48, 64)],
    [*range(32, 48), *range(0, 16)],
    [*range(17, 33), *range(40, 56)],
    [*range(0, 5), *range(8, 14), *range(20, 25)],
    [*range(31, 15, -1)],
    [*range(0, 7), 9, *range(16, 24)],
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", RUNS, ids=range(len(RUNS)))
def test_columns_in_runs(runner, layout, columns):
    for dtype, delta_dtype in zip(DTYPES, (torch.float64, torch.float32, torch.bfloat16, torch.float32)):
        values, index = random((9, 64), dtype), torch.tensor(columns)
        runner.configure(len(columns), max_blocks=1)
        check(runner, values, layout, random((9, len(columns)), delta_dtype), index, len(columns), 1)


def test_runs_that_leave_the_weight(runner):
    values = random((4, 16), torch.bfloat16)
    index = torch.tensor([*range(12, 20), *range(-4, 4), *range(0, 8)])
    weight, base, delta = values.clone(), random((4, 24), torch.bfloat16), random((4, 24), torch.float32)
    runner.write_slices((weight, base, delta, index, 1))
    assert torch.equal(weight[:, 12:], effective(base, delta)[:, :4])
    assert torch.equal(weight[:, 8:12], values[:, 8:12])


@pytest.mark.parametrize("misaligned", ("index", "columns"))
def test_an_index_that_is_not_aligned(runner, misaligned):
    memory = torch.tensor([0, *range(8, 24)])
    index = memory[1:] if misaligned == "index" else memory[1:].clone() + 1
    check(runner, random((5, 32), torch.bfloat16), "dense", random((5, 16), torch.float32), index, 16, 1)
