"""multi_adapter_linear: every sequence gets the output of the weight that is merged with its own adapter.

test_every_op.py has the common hazards, test_without_waits.py runs the reference of GPUs on all cases.
"""

import sys

import pytest
import torch
from ops.cases import bank
from support.inside import without_waiting
from support.tolerances import GEMM

dims = pytest.mark.parametrize("dim", (0, 1))
counts = pytest.mark.parametrize("count", (4, 40))  # adapters: 4 take one product, 40 a product for each sequence


def assert_close(ours, theirs):
    rtol, atol = GEMM[torch.float32]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol * theirs.abs().max().item())


@dims
def test_thousands_of_adapters(dim):
    sizes, names = torch.randint(0, 9, (3000,)).tolist(), torch.randperm(3000).tolist()
    case = bank(dim, (3000,), sizes, (48, 64), names)
    assert_close(case.run(*case.tensors), case.definition(*case.tensors))


def test_sequences_without_an_adapter_do_not_change():
    case = bank(1, (4, 3), (3, 0, 1), names=(-1, 0, -1, 1), dtype=torch.bfloat16)  # adapter 1 is empty
    assert torch.equal(case.run(*case.tensors)[[0, 2, 3]], case.tensors[1][[0, 2, 3]])


@pytest.mark.parametrize("sizes", ((), (0, 0)), ids=str)
@dims
def test_a_bank_without_units(dim, sizes):
    case = bank(dim, (3, 2), (0,), names=(-1, -1, -1))
    x, y, values, index, offsets, adapter = case.tensors
    offsets = torch.zeros(len(sizes) + 1, dtype=offsets.dtype)
    for op in (case.run, lambda *tensors: without_waiting(*tensors, dim)):
        assert torch.equal(op(x, y, values, index, offsets, adapter), y)


@dims
def test_the_reference_for_a_gpu_in_pieces(dim, monkeypatch):
    monkeypatch.setattr(sys.modules[without_waiting.__module__], "PIECE", 45)
    case = bank(dim, (4, 2), shape=(53, 37))
    tensors = [tensor.detach() for tensor in case.tensors]
    assert_close(without_waiting(*tensors, dim), case.definition(*tensors))


@counts
@dims
def test_the_reference_for_a_gpu_skips_numbers_out_of_range(dim, count):
    case = bank(dim, (5, 2), (30,) * count, (53, 37), (0, 1, 2, 3, -1))
    x, y, values, index, offsets, adapter = (tensor.detach() for tensor in case.tensors)
    wrong_index, zeroed, wrong = index.clone(), values.clone(), adapter.clone()
    wrong_index[[0, 3]], zeroed[[0, 3]] = torch.tensor([-1, 999]), 0.0
    wrong[[2, 3]], adapter[[2, 3]] = torch.tensor([count, -5]), -1
    expected = case.definition(x, y, zeroed, index, offsets, adapter)
    assert_close(without_waiting(x, y, values, wrong_index, offsets, wrong, dim), expected)
    offsets[1:3] = torch.tensor([99999, 7])  # adapters 0 to 2 have no valid range
    assert torch.equal(without_waiting(x, y, values, index, offsets, wrong, dim)[:2], y[:2])


@counts
@dims
def test_nan_in_one_adapter_does_not_change_other_sequences(dim, count):
    case = bank(dim, (4, 2), (30,) * count, (53, 37), (0, 1, -1, 2))
    x, y, values, *rest = (tensor.detach() for tensor in case.tensors)
    expected, broken = case.definition(x, y, values, *rest), values.clone()
    broken[30:60, 3] = float("nan")
    out = without_waiting(x, y, broken, *rest, dim)
    assert_close(out[[0, 2, 3]], expected[[0, 2, 3]])
    assert out[1].isnan().any()


@dims
def test_autocast_uses_the_dtype_of_y(dim):
    x, *rest = (case := bank(dim, dtype=torch.bfloat16)).tensors
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run(x.float(), *rest)
    assert out.dtype is torch.bfloat16 and torch.equal(out, case.run(x, *rest))


@dims
def test_autocast_changes_no_product(dim):
    case = bank(dim, (3, 64), (30, 30), (53, 37), (0, 1, 1))  # enough tokens for a product of PyTorch
    tensors = [tensor.detach() for tensor in case.tensors]
    expected = case.run(*tensors)
    with torch.autocast("cpu", torch.bfloat16):  # which the worker threads of a CPU don't have
        assert torch.equal(case.run(*tensors), expected)
