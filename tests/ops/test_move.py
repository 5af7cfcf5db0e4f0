"""swap_ and permute_: the ops that move rows and columns of a weight."""
import itertools

import pytest
import torch

from s2ft.ops import permute_, swap_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((7,), (1, 1), (13, 9), (3, 5, 4))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))
CASES = [(shape, dim) for shape in SHAPES for dim in range(len(shape))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,dim", CASES)
def test_swap_exchanges_and_comes_back(shape, dim, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    for units in (0, 1, (shape[dim] + 1) // 2, shape[dim]):
        index = torch.randperm(shape[dim], device=device)[:units]
        values = torch.randn(*shape[:dim], units, *shape[dim + 1:], device=device).to(dtype)
        w, v = weight.clone(), values.clone()
        swap_(w, index, v, dim)
        assert torch.equal(w, weight.index_copy(dim, index, values))
        assert torch.equal(v, weight.index_select(dim, index))
        swap_(w, index, v, dim)
        assert torch.equal(w, weight) and torch.equal(v, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape,dim", CASES)
def test_permute_is_index_select_in_place(shape, dim, dtype, device):
    weight = torch.randn(shape, device=device).to(dtype)
    for order in (torch.arange(shape[dim]), torch.randperm(shape[dim]), torch.arange(shape[dim]).flip(0)):
        order = order.to(device)
        w = weight.clone()
        permute_(w, order, dim)
        assert torch.equal(w, weight.index_select(dim, order))
        permute_(w, order.argsort(), dim)
        assert torch.equal(w, weight)


@pytest.mark.parametrize("layout", ("transposed", "strided", "offset"))
@pytest.mark.parametrize("dim", (0, 1))
def test_layouts(layout, dim):
    make = {"transposed": lambda: torch.randn(8, 12).t(), "strided": lambda: torch.randn(24, 24)[::2, ::3],
            "offset": lambda: torch.randn(97)[1:].view(12, 8)}
    weight = make[layout]()
    whole, order, index = weight.clone(), torch.randperm(weight.shape[dim]), torch.tensor([5, 0, 3])
    permute_(weight, order, dim)
    assert torch.equal(weight, whole.index_select(dim, order))
    values = torch.zeros_like(weight.index_select(dim, index))
    held = weight.index_select(dim, index)
    swap_(weight, index, values, dim)
    assert torch.equal(values, held) and not weight.index_select(dim, index).any()


def test_compiled_kernels_equal_references():
    for op, (shape, dim) in itertools.product((swap_, permute_), CASES):
        reference = __import__(f"s2ft.ops.{op.__name__}", fromlist=["reference"]).reference
        ours, theirs = (w := torch.randn(shape)), w.clone()
        index = torch.randperm(shape[dim])
        if op is swap_:
            values = torch.randn(shape)
            other = values.clone()
            swap_(ours, index, values, dim)
            reference(theirs, index, other, dim)
            assert torch.equal(values, other)
        else:
            permute_(ours, index, dim)
            reference(theirs, index, dim)
        assert torch.equal(ours, theirs)


def test_opcheck():
    torch.library.opcheck(torch.ops.s2ft.swap_.default,
                          (torch.randn(5, 6), torch.tensor([4, 0]), torch.randn(5, 2), 1))
    torch.library.opcheck(torch.ops.s2ft.permute_.default, (torch.randn(5, 6), torch.randperm(5), 0))


@pytest.mark.parametrize("op", (swap_, permute_), ids=lambda op: op.__name__)
def test_a_backward_that_kept_the_weight_raises(op):
    weight, x = torch.randn(4, 6), torch.randn(3, 6, requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    if op is swap_:
        swap_(weight, torch.tensor([1]), torch.randn(1, 6), 0)
    else:
        permute_(weight, torch.tensor([1, 0, 2, 3]), 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BAD = {
    "swap dim": (lambda w: swap_(w, torch.arange(2), torch.ones(2, 6), 2), "dim"),
    "swap high": (lambda w: swap_(w, torch.tensor([0, 4]), torch.ones(2, 6), 0), "index 4"),
    "swap low": (lambda w: swap_(w, torch.tensor([-1, 0]), torch.ones(2, 6), 0), "index -1"),
    "swap twice": (lambda w: swap_(w, torch.tensor([1, 1]), torch.ones(2, 6), 0), "twice"),
    "swap values": (lambda w: swap_(w, torch.tensor([1, 2]), torch.ones(6, 2), 0), "values must"),
    "swap dtype": (lambda w: swap_(w, torch.tensor([1]), torch.ones(1, 6).double(), 0), "values must"),
    "permute length": (lambda w: permute_(w, torch.arange(3), 0), "order must"),
    "permute repeat": (lambda w: permute_(w, torch.tensor([0, 1, 1, 3]), 0), "no permutation"),
    "permute outside": (lambda w: permute_(w, torch.tensor([0, 1, 2, 4]), 0), "no permutation"),
    "permute dim": (lambda w: permute_(w, torch.arange(4), -1), "dim"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_raise_and_leave_the_weight(bad):
    call, message = BAD[bad]
    weight = torch.arange(24.).view(4, 6)
    with pytest.raises(ValueError, match=message):
        call(weight)
    assert torch.equal(weight, torch.arange(24.).view(4, 6))
