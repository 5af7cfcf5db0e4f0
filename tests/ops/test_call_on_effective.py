"""Eager calls on the CPU run PyTorch's product while base + delta is in the weight, without an op of their own."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from state.threads import in_threads
from support.inside import _effective, _linear, call_on_effective, effective_units

import s2ft
from s2ft.ops import indexed_linear, sliced_linear

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
UNITS = {"slice": 3, "index": torch.tensor([5, 0, 3, 4])}

pytestmark = pytest.mark.skipif(_effective._module is None, reason="needs the compiled kernels")


def case(dim, units, dtype=torch.float32, delta_dtype=None, shape=(9, 11), transposed=False):
    """A weight, a delta of four units, and the effective weight."""
    weight = torch.randn(*(reversed(shape) if transposed else shape)).to(dtype)
    weight = weight.t() if transposed else weight
    delta = torch.randn((4, shape[1]) if dim == 0 else (shape[0], 4)).to(delta_dtype or dtype)
    index = units if isinstance(units, torch.Tensor) else torch.arange(units, units + 4)
    effective = weight.clone()
    effective.index_copy_(dim, index, effective_units(weight.index_select(dim, index), delta))
    return weight, delta, effective


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("dim", (0, 1))
def test_the_function_sees_the_effective_weight_and_leaves_the_base(dim, units, dtype):
    for delta_dtype in DTYPES:
        for transposed in (False, True):
            weight, delta, effective = case(dim, units, dtype, delta_dtype, transposed=transposed)
            base = weight.clone()
            assert torch.equal(call_on_effective(torch.clone, (weight,), weight, delta, units, dim), effective)
            assert torch.equal(weight, base)


@pytest.mark.parametrize("op, units", [(sliced_linear, 3), (indexed_linear, UNITS["index"])], ids=UNITS)
@pytest.mark.parametrize("dim", (0, 1))
def test_forward_and_backward_of_a_plain_call_use_no_op(op, units, dim, monkeypatch):
    weight, delta, effective = case(dim, units)
    used: list = []
    monkeypatch.setattr(_linear, "below_autograd", lambda op, *arguments: used.append(op) or op(*arguments))
    x = torch.randn(2, 3, 11, requires_grad=True)
    y = op(x, weight, delta.requires_grad_(), units, dim)
    y.sum().backward()
    with torch.no_grad():
        assert torch.equal(op(x, weight, delta, units, dim), y)
    assert torch.equal(y, F.linear(x, effective.detach())) and not used


def test_a_weight_that_requires_a_gradient_gets_none():
    weight, delta, effective = case(0, 3)
    x = torch.randn(2, 11)
    y = sliced_linear(x, weight.requires_grad_(), delta, 3, 0)
    assert torch.equal(y, F.linear(x, effective))
    y.sum().backward()
    assert weight.grad is None


def test_large_slices_are_written_without_the_gil():
    weight, delta, effective = case(0, 3, shape=(8, 40_000))
    base = weight.clone()
    assert delta.numel() > 64 << 10
    assert torch.equal(call_on_effective(torch.clone, (weight,), weight, delta, 3, 0), effective)
    assert torch.equal(weight, base)


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_a_function_that_raises_leaves_the_base(units):
    weight, delta, _ = case(0, units)
    base = weight.clone()
    assert call_on_effective(torch.matmul, (torch.ones(2, 3), weight), weight, delta, units, 0) is None
    assert torch.equal(weight, base)

    def interrupted(weight):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_on_effective(interrupted, (weight,), weight, delta, units, 0)
    assert torch.equal(weight, base)
    with s2ft.stable_weights():  # the lock is free
        pass


WRONG = {
    "a slice that ends after the weight": lambda w, d: (w, d, 6, 0),
    "a slice that starts before it": lambda w, d: (w, d, -1, 0),
    "an index after the weight": lambda w, d: (w, d, torch.tensor([0, 1, 2, 9]), 0),
    "a negative index": lambda w, d: (w, d, torch.tensor([0, 1, 2, -1]), 0),
    "an index of another length": lambda w, d: (w, d, torch.tensor([0, 1]), 0),
    "an index of int32": lambda w, d: (w, d, torch.tensor([0, 1, 2, 3], dtype=torch.int32), 0),
    "another dimension": lambda w, d: (w, d, 3, 1),
    "no such dimension": lambda w, d: (w, d, 3, 2),
    "a delta of another width": lambda w, d: (w, d[:, 1:].contiguous(), 3, 0),
    "a delta with gaps": lambda w, d: (w, d.repeat(1, 2)[:, ::2], 3, 0),
    "a delta of integers": lambda w, d: (w, d.long(), 3, 0),
    "a weight with one row in all places": lambda w, d: (w[:1].expand(9, 11), d, 3, 0),
    "a weight of three dimensions": lambda w, d: (w[None], d, 3, 0),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_it_can_not_run_changes_nothing_and_is_left_to_the_op(wrong):
    weight, delta, _ = case(0, 3)
    base, arguments = weight.clone(), wrong(weight, delta)
    assert call_on_effective(torch.clone, arguments[:1], *arguments) is None
    assert torch.equal(weight, base)


def test_threads_with_plain_calls_registered_ops_and_readers_of_the_base():
    weight, delta, effective = case(0, 3, shape=(64, 2000))
    base, x = weight.clone(), torch.randn(4, 2000)
    expected, op = F.linear(x, effective), torch.ops.s2ft.sliced_linear

    def reads_the_base():
        with s2ft.stable_weights():
            return torch.equal(weight, base)

    def repeat(check):
        assert all(check() for _ in range(100))

    checks = (
        lambda: torch.equal(sliced_linear(x, weight, delta, 3, 0), expected),
        lambda: torch.equal(sliced_linear(x, weight, delta, 3, 0), expected),
        lambda: torch.equal(op(x, weight, delta, 3, 0, None, None), expected),
        reads_the_base,
    )
    in_threads(partial(repeat, check) for check in checks)


def test_the_compiled_function_refuses_other_arguments():
    with pytest.raises(TypeError):
        _effective._module.call_on_effective(torch.clone, ())
    with pytest.raises(TypeError):
        _effective._module.call_on_effective(torch.clone, (), *["1"] * 13)
