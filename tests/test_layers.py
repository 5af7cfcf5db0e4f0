"""S2ColumnLinear and S2RowLinear: one test for each property that the layers promise."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.states import saved_and_loaded
from torch import nn

from s2ft import S2ColumnLinear, S2RowLinear

KINDS = (S2ColumnLinear, S2RowLinear)
UNITS = {"slice": dict(start=2, end=5), "scattered": dict(index=torch.tensor([6, 0, 3]))}
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=UNITS)
def units(request):
    return UNITS[request.param]


@torch.no_grad()
def layer_of(kind, units, dtype=torch.float32, **more):
    layer = kind(11, 9, dtype=dtype, **units, **more)
    layer.s2.normal_()
    return layer


def effective(layer, units):
    """base + s2 in the selected units."""
    weight = layer.base_weight().detach().clone()
    index = units["index"] if "index" in units else torch.arange(units["start"], units["end"])
    return weight.index_copy(
        layer.dim, index, (weight.index_select(layer.dim, index) + layer.s2.detach()).to(weight.dtype)
    )


def step(layer, optimizer):
    layer(torch.randn(4, 3, 11, dtype=layer.weight.dtype)).float().pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- constructor -------------------------------------------------------------------------------------


def test_constructor_of_the_reference():
    layer = S2RowLinear(11, 9, True, 2, 5, torch.device("cpu"), torch.bfloat16)
    assert layer.s2.shape == (9, 3) and layer.weight.shape == (9, 11) and layer.bias.shape == (9,)
    assert S2ColumnLinear(11, 9, False, 2, 5).s2.shape == (3, 11)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["s2"]


@pytest.mark.parametrize("bias", (True, False, None, torch.arange(9.0)), ids=("true", "false", "none", "tensor"))
def test_bias_and_whole_dimension_by_default(kind, bias):
    layer = kind(11, 9, bias=bias)
    assert layer.s2.shape == layer.weight.shape and (layer.bias is not None) == (bias is not None and bias is not False)
    if isinstance(bias, torch.Tensor):
        assert torch.equal(layer.bias, bias) and not layer.bias.requires_grad


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(start=5, end=2), "start=5 end=2"),
        (dict(start=3, end=3), "start=3 end=3"),
        (dict(start=-1, end=2), "start=-1"),
        (dict(start=0, end=12), "end=12"),
        (dict(index=torch.tensor([0, 11])), "index 11 outside 0..10"),
        (dict(index=torch.tensor([-1])), "index -1 outside 0..10"),
        (dict(index=torch.tensor([1, 1])), "unit 1 twice"),
        (dict(index=torch.tensor([], dtype=torch.long)), "at least one"),
        (dict(start=0, end=1, index=torch.tensor([1])), "start end index"),
        (dict(start=0, end=1, bias=torch.zeros(3)), "bias shape"),
    ],
)
def test_bad_selection_raises(kind, bad, words):
    with pytest.raises(ValueError) as caught:
        kind(11, 9 if kind is S2RowLinear or "bias" in bad else 11, **bad)
    assert all(word in str(caught.value) for word in words.split())


def test_meta_device(kind):
    layer = kind(11, 9, start=2, end=5, device="meta", dtype=torch.bfloat16)
    assert layer.s2.is_meta and layer(torch.empty(3, 11, device="meta", dtype=torch.bfloat16)).shape == (3, 9)


# ---- fuse, unfuse, state -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_fused_weight_equals_the_weight_in_training(kind, units, dtype):
    layer = layer_of(kind, units, dtype, delta_dtype=torch.float32).eval()
    x, expected = torch.randn(4, 11).to(dtype), effective(layer, units)
    y = layer(x)
    layer.fuse_s2_weight()
    assert layer.fused and torch.equal(layer.weight, expected) and torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF))
def test_a_hundred_fuse_and_unfuse_restore_the_base_exactly(kind, units, dtype):
    layer = layer_of(kind, units, dtype).eval()
    weight = layer.weight.clone()
    for _ in range(100):
        layer.fuse()
        layer.unfuse_s2_weight()
    assert torch.equal(layer.weight, weight) and layer.weight.is_leaf and not layer.fused


COPIES = {
    "deepcopy": lambda layer, other: copy.deepcopy(layer),
    "pickle": lambda layer, other: saved_and_loaded(layer),
    "state into one with the base": lambda layer, other: with_state_of(layer, other),
    "state into one with base + s2": lambda layer, other: with_state_of(layer, other.fuse() or other),
}


def with_state_of(layer, other):
    other.load_state_dict(saved_and_loaded(layer.state_dict()))
    return other


@pytest.mark.parametrize("fused", (False, True), ids=("base", "base + s2"))
@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same(kind, units, way, fused):
    layer, other = layer_of(kind, units).eval(), layer_of(kind, units).eval()
    base = layer.weight.clone()
    if fused:
        layer.fuse()
    made, x = COPIES[way](layer, other), torch.randn(4, 11)
    assert torch.equal(made(x), layer(x))
    made.unfuse()
    assert torch.equal(made.weight, base) and torch.equal(made.s2, layer.s2)


def test_changing_the_dtype_while_fused(kind, units):
    layer = layer_of(kind, units).eval()
    base = layer.weight.clone()
    layer.fuse()
    layer.to(torch.bfloat16).unfuse()
    assert torch.equal(layer.weight, base.to(torch.bfloat16))


# ---- the steps of the reference code -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("replace", ("data", "copy"))
def test_the_steps_of_the_reference_code(kind, dtype, replace):
    """Construct, load_state_dict(strict=False), replace .weight.data by the permuted weight, train, replace it again."""
    linear = nn.Linear(11, 9, dtype=dtype)
    layer = kind(in_features=11, out_features=9, bias=linear.bias, start=2, end=5, device="cpu", dtype=dtype)
    layer.load_state_dict(copy.deepcopy(linear.state_dict()), strict=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(2):
        permuted = linear.weight.data[torch.randperm(9)]
        if replace == "data":
            layer.weight.data = permuted.clone()
        else:
            layer.unfuse()
            layer.weight.data.copy_(permuted)  # no version counter changes
        step(layer, optimizer)
        x = torch.randn(2, 5, 11, dtype=dtype)
        assert torch.equal(layer.base_weight(), permuted) and layer.s2.any()
        assert torch.equal(layer(x), F.linear(x, effective(layer, UNITS["slice"]), layer.bias))


def test_new_values_of_a_layer_keep_none_of_the_old(kind, units):
    layer = layer_of(kind, units)
    layer(torch.randn(2, 11))
    layer.reset_parameters()
    new = layer.weight.detach().clone()
    layer(torch.randn(2, 11))
    assert torch.equal(layer.weight, new) and not layer.s2.any()


def test_hooks_of_the_linear_layer_are_kept(kind):
    linear, seen = nn.Linear(11, 9), []
    handle = linear.register_forward_hook(lambda *args: seen.append(1))
    layer = kind.from_module(linear, 2, 5)
    layer(torch.randn(2, 11))
    handle.remove()
    layer(torch.randn(2, 11))
    assert seen == [1] and layer.weight is linear.weight
    linear.register_full_backward_hook(lambda *args: seen.append(2))
    kind.from_module(linear, 2, 5)(torch.randn(2, 11)).sum().backward()
    assert seen == [1, 2]
