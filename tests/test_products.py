"""The product of every kind of trainable layer: values, gradients of any order, and what a forward keeps."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.inside import S2ColumnConv, S2ColumnExperts, S2RowConv, S2RowExperts
from support.slices import bytes_kept
from support.tolerances import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from s2ft import S2ColumnLinear, S2RowLinear

ROWS = (5, 0, 3, 1)  # of each expert
COUNTS = (3, 0, 1, 2)  # units of each expert
OFFSETS = torch.tensor(ROWS).cumsum(0, dtype=torch.int32)
INDEX = torch.tensor([4, 0, 3])


@dataclass
class Case:
    """A layer with random values in s2, its inputs, and what a plain layer with its weight computes."""

    layer: nn.Module
    inputs: tuple
    units: Callable[[Tensor], Tensor]  # the units in a tensor of the weight's shape
    plain: Callable[..., Tensor]  # of the inputs and the effective weight

    def run(self, x: Tensor, s2: Tensor) -> Tensor:
        return functional_call(self.layer, {"s2": s2 * 1}, (x, *self.inputs[1:]))

    def defined(self, x: Tensor, s2: Tensor) -> Tensor:
        base = self.layer.base_weight().detach()
        # by differences of one element each, so that no formula of s2ft is used
        places = self.units(torch.arange(base.numel(), device=base.device).view(base.shape))
        sums = (base.flatten()[places] + s2).to(base.dtype)
        weight = base.flatten().index_copy(0, places.flatten(), sums.flatten()).view(base.shape)
        return self.plain(x, *self.inputs[1:], weight)


def linear(dim: int, index: Tensor | None, dtype: torch.dtype, delta_dtype: torch.dtype) -> Case:
    kind = (S2ColumnLinear, S2RowLinear)[dim]
    units = dict(start=1, end=4) if index is None else dict(index=index)
    layer = kind(7, 6, dtype=dtype, delta_dtype=delta_dtype, **units)
    where = torch.arange(1, 4) if index is None else index
    x = torch.randn(2, 3, 7, dtype=dtype, requires_grad=True)
    return Case(layer, (x,), lambda w: w.index_select(dim, where), lambda x, w: F.linear(x, w, layer.bias))


def convolution(dim: int, dtype: torch.dtype, delta_dtype: torch.dtype) -> Case:
    conv = nn.Conv2d(5, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), dtype=dtype)
    layer = (S2ColumnConv, S2RowConv)[dim].from_module(conv, index=INDEX, delta_dtype=delta_dtype)
    options = dict(stride=2, padding=(1, 0), dilation=(1, 2))
    x = torch.randn(2, 5, 6, 6, dtype=dtype, requires_grad=True)
    return Case(
        layer, (x,), lambda w: w.index_select(dim, INDEX).flatten(2), lambda x, w: F.conv2d(x, w, layer.bias, **options)
    )


def experts(dim: int, transposed: bool, dtype: torch.dtype, delta_dtype: torch.dtype) -> Case:
    outputs, inputs = 16, 32
    size = (outputs, inputs)[dim]
    weight = torch.randn(len(ROWS), *((inputs, outputs) if transposed else (outputs, inputs)), dtype=dtype)
    index = {expert: torch.randperm(size)[:count] for expert, count in enumerate(COUNTS) if count}
    layer = (S2ColumnExperts, S2RowExperts)[dim](nn.Parameter(weight), index, delta_dtype, transposed)

    def units(weight: Tensor) -> Tensor:
        matrices = [one.t() if transposed else one for one in weight]
        return torch.cat([matrices[expert].index_select(dim, own) for expert, own in index.items()], dim)

    def plain(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
        matrices = [one.t() if transposed else one for one in weight]
        return torch.cat([F.linear(part, one) for part, one in zip(x.split(ROWS), matrices)])

    return Case(layer, (torch.randn(sum(ROWS), inputs, dtype=dtype, requires_grad=True), OFFSETS), units, plain)


CASES = {
    **{f"slice {dim}": lambda *dtypes, dim=dim: linear(dim, None, *dtypes) for dim in (0, 1)},
    **{f"index {dim}": lambda *dtypes, dim=dim: linear(dim, INDEX, *dtypes) for dim in (0, 1)},
    **{f"convolution {dim}": lambda *dtypes, dim=dim: convolution(dim, *dtypes) for dim in (0, 1)},
    **{f"experts {dim}": lambda *dtypes, dim=dim: experts(dim, False, *dtypes) for dim in (0, 1)},
    **{f"transposed experts {dim}": lambda *dtypes, dim=dim: experts(dim, True, *dtypes) for dim in (0, 1)},
}
LINEAR = [name for name in CASES if name.startswith(("slice", "index"))]
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]


def made(name: str, dtype: torch.dtype = torch.float32, delta_dtype: torch.dtype = torch.float32) -> Case:
    case = CASES[name](dtype, delta_dtype)
    nn.init.normal_(case.layer.s2)
    return case


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_plain_layer_with_the_merged_weight(name, dtypes):
    case = made(name, *dtypes)
    x, s2 = case.inputs[0], case.layer.s2
    y, expected = case.layer(*case.inputs), case.defined(x, s2)
    if name in LINEAR:
        assert torch.equal(y, expected)
    upstream = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(one, (x, s2), upstream) for one in (y, expected))
    assert [one.dtype for one in ours] == list(dtypes)
    assert_close((y, *ours), (expected, *theirs), dtypes[0])


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    case = made(name, torch.float64, torch.float64)
    x, s2 = case.inputs[0], case.layer.s2

    def second(function):
        first = torch.autograd.grad(function(x, s2).sin().sum(), (x, s2), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].cos().sum(), (x, s2))

    assert_close(second(case.run), second(case.defined), torch.float64)


@pytest.mark.parametrize("name", [name for name in CASES if "experts" not in name])  # no rule for batches of groups
def test_torch_func(name):
    """s2ft's own function can't be looked into: it runs on a copy of the weight."""
    case = made(name, torch.float64, torch.float64)
    x, s2 = case.inputs[0].detach(), case.layer.s2.detach()
    tangents = torch.randn_like(x), torch.randn_like(s2)
    for function in (
        lambda run: torch.func.jvp(run, (x, s2), tangents)[1],
        lambda run: torch.func.jacrev(lambda s2: run(x, s2).sum(-1))(s2),
        lambda run: torch.func.vmap(run, (None, 0))(x, torch.stack((s2, 2 * s2))),
    ):
        torch.testing.assert_close(function(case.run), function(case.defined))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip((x, s2), tangents)]
        torch.testing.assert_close(*(forward_ad.unpack_dual(run(*duals)) for run in (case.run, case.defined)))


# Bytes that a forward keeps beside its arguments: the selected columns of x as a copy, since a view would keep all of x
KEPT = {
    "slice 0": 0,
    "slice 1": 2 * 3 * 3 * 4,
    "index 1": 2 * 3 * 3 * 4,
    "convolution 1": 2 * 3 * 36 * 4,
    "experts 1": 9 * 4 * 4,  # padded to 16 bytes
}


@pytest.mark.parametrize("trains", (True, False))
@pytest.mark.parametrize("name", KEPT)
def test_a_forward_keeps_only_what_it_needs_of_x(name, trains):
    """Of a frozen slice it keeps nothing."""
    case = made(name)
    case.layer.s2.requires_grad_(trains)
    given = (*case.inputs, case.layer.weight, case.layer.s2)
    assert bytes_kept(given, lambda: case.layer(*case.inputs)) == trains * KEPT[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep", (lambda saved: saved, torch.clone), ids=("the weight", "a copy"))
def test_the_base_may_be_back_in_a_backward(name, keep):
    """As inside disable_adapters, for the reference model of DPO. Afterwards the layer holds its slice again.

    Hooks such as those of save_on_cpu keep a copy of the weight, with base + s2.
    """
    case = made(name)
    x, s2 = case.inputs[0], case.layer.s2
    base = case.layer.weight.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        upstream = torch.randn_like(y := case.layer(*case.inputs))
    expected = torch.autograd.grad(y, (x, s2), upstream, retain_graph=True)
    effective = case.layer.weight.detach().clone()
    case.layer.unfuse()
    assert torch.equal(case.layer.weight, base) and not torch.equal(effective, base)
    assert_close(torch.autograd.grad(y, (x, s2), upstream), expected, torch.float32)
    case.layer(*case.inputs)
    assert torch.equal(case.layer.weight, effective)


@pytest.mark.parametrize("name", CASES)
def test_several_forwards_before_a_backward(name):
    case = made(name)
    x, rest = case.inputs[0], case.inputs[1:]
    (case.layer(x, *rest) + case.layer(x * 2, *rest)).sum().backward()
    expected = torch.autograd.grad(3 * case.defined(x, case.layer.s2).sum(), case.layer.s2)
    assert_close([case.layer.s2.grad], expected, torch.float32)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("1")])
def test_a_slice_that_changes_before_the_backward_is_an_error(name):
    case = made(name)
    y = case.layer(*case.inputs)
    with torch.no_grad():
        case.layer.s2.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_a_model_may_change_the_output_in_place(name):
    """As nn.ReLU(inplace=True) and OLMo's clip_qkv do. Autograd refuses it for a view."""
    case = made(name)
    x, s2 = case.inputs[0], case.layer.s2
    y, expected = case.layer(*case.inputs).mul_(2).relu_(), (case.defined(x, s2) * 2).relu()
    ours, theirs = (torch.autograd.grad(one.sum(), (x, s2)) for one in (y, expected))
    assert_close((y, *ours), (expected, *theirs), torch.float32)


CHANGES = {
    "in place": lambda s2: s2.add_(1),
    "an optimizer": lambda s2: torch.optim.SGD([s2], 0.1).step(),
    "an optimizer that hides it": lambda s2: Hidden([s2], {}).step(),
    "a loop over data": lambda s2: s2.data.sub_(0.1 * s2.grad),
    "an average in its place": lambda s2: (torch.optim.SGD([s2], 0.1).step(), s2.data.mul_(0.5)),
    "other memory": lambda s2: setattr(s2, "data", s2.data + 1),
}


class Hidden(torch.optim.Optimizer):
    """An optimizer whose change no version counts."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ("slice 1", "index 0", "convolution 0", "experts 1"))
def test_every_change_of_the_slice_is_written(name, change):
    case = made(name)
    x, s2 = case.inputs[0], case.layer.s2
    case.layer(*case.inputs).sum().backward()
    with torch.no_grad():
        CHANGES[change](s2)
        if "optimizer" in change:  # the weight holds it at once, for whoever reads it past its layer
            written = case.layer.weight.detach().clone()
        assert_close([case.layer(*case.inputs)], [case.defined(x, s2)], torch.float32)
        assert "optimizer" not in change or torch.equal(case.layer.weight, written)


@pytest.mark.parametrize("is_copied", ("before the first forward", "after it"))
def test_an_average_of_copies(is_copied):
    """As torch.optim.swa_utils.AveragedModel keeps it: its slice is an average, and so is what it computes with."""
    case = made("slice 0")
    early, _, other = copy.deepcopy(case.layer), case.layer(*case.inputs), copy.deepcopy(case.layer)
    other = early if "before" in is_copied else other
    with torch.no_grad():
        for one, two in zip(other.parameters(), case.layer.parameters()):
            one.lerp_(two * 3, 0.5) if one.requires_grad else one.lerp_(two, 0.5)
    expected = F.linear(case.inputs[0], case.layer.base_weight(), case.layer.bias)
    expected = expected + F.pad(F.linear(case.inputs[0], 2 * case.layer.s2), (1, 2))
    torch.testing.assert_close(other(case.inputs[0]), expected)
