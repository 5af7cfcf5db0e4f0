"""grouped_linear: what only it does. test_every_op.py has the common hazards."""

import sys
from contextlib import nullcontext

import pytest
import torch
from ops.cases import ALL, DTYPES, effective_groups, grouped
from support.inside import grouped_mm, grouped_outer

from s2ft.ops import grouped_linear

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.cuda))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (*DTYPES, "autocast"), ids=str)
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("grouped_linear")])
def test_equals_the_product_of_the_merged_weights_bit_for_bit(name, dtype, device):
    case = ALL[name](dtype=torch.float32 if dtype == "autocast" else dtype)
    x, weight, delta, index, offsets = (tensor.detach().to(device) for tensor in case.tensors)
    dim = int(name.split()[1])
    merged = torch.empty_like(weight).copy_(effective_groups(weight, delta, index, dim))  # stored as the weight is
    with torch.autocast(device, torch.bfloat16) if dtype == "autocast" else nullcontext():
        y = case.run(x, weight, delta, index, offsets)
    assert torch.equal(y, grouped_mm(x.to(y.dtype), merged.to(y.dtype).mT, offsets))


def test_neighbouring_units_of_two_groups():
    """The last unit of a group and the first of the next have neighbouring numbers, and are no neighbours in memory."""
    for dim in (0, 1):
        for transposed in (False, True):
            case = grouped(dim, (2, 2, 2, 2), transposed=transposed)
            size = case.tensors[1].shape[1 + dim]
            case.tensors[3].copy_(
                torch.tensor([unit for group in range(4) for unit in (group * size, group * size + size - 1)])
            )
            torch.testing.assert_close(case.results(), case.results(case.definition), rtol=1e-5, atol=1e-4)


def test_rows_of_no_group_get_no_gradient_into_delta():
    case = grouped(1)
    x, weight, delta, index, offsets = case.tensors
    upstream, more = torch.randn(12, 16), torch.cat([x.detach(), torch.randn(3, 32)])
    (got,) = torch.autograd.grad(case.run(more, weight, delta, index, offsets), delta, upstream)
    (expected,) = torch.autograd.grad(case.definition(*case.tensors), delta, upstream[:9])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_parts_are_ops_too():
    x, grad, stack = (torch.randn(*shape, requires_grad=True) for shape in ((9, 32), (9, 16), (4, 32, 8)))
    offsets = torch.tensor([5, 5, 8, 9], dtype=torch.int32)
    torch.library.opcheck(grouped_mm, (x, stack, offsets))
    torch.library.opcheck(grouped_outer, (x, grad, offsets))


def test_a_failed_product_restores_the_base(monkeypatch):
    module, case = sys.modules[grouped_linear.__module__], grouped(1)
    before = case.tensors[1].clone()

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(module, "product", fail)
    (_, arguments), _ = case.registered
    with pytest.raises(MemoryError):
        module.reference(*arguments)
    assert torch.equal(case.tensors[1], before)


def test_a_product_that_fails_in_the_kernel_restores_the_base():
    """Offsets beyond the rows make the loop over the groups fail, after base + delta was written."""
    case = ALL[next(name for name in ALL if "(7, 5)" in name and name.startswith("grouped_linear 1"))]()
    x, weight, delta, index, offsets = (tensor.detach() for tensor in case.tensors)
    before = weight.clone()
    with pytest.raises(RuntimeError):
        case.run(x, weight, delta, index, offsets + 40)
    assert torch.equal(weight, before)
