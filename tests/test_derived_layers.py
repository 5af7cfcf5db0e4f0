"""Layers of classes derived from nn.Linear and Conv1D: what the class adds to the forward is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.inside import S2Layer, S2RowOwnForward, computes_linear, kind_of
from support.nets import seeded
from support.peft_modules import Router
from support.states import randomize, saved_and_loaded, with_adapter
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import s2ft
from s2ft import Coupling, S2ColumnLinear, S2FTConfig

WIDTH, CHANNELS = 6, 10


class Renamed(nn.Linear):
    """Another name, the same forward."""


class Scaled(nn.Linear):
    """A parameter, a buffer and a layer of its own, as in the heads and decoupled layers of transformers."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.scale = nn.Parameter(torch.rand(self.out_features) + 0.5)
        self.register_buffer("shift", torch.randn(self.out_features))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.more = nn.Linear(self.out_features, self.out_features)
        self.factor = 2.0

    def forward(self, x, plus=0.0):
        self.seen.add_(1)
        return self.more(super().forward(x)) * self.scale * self.factor + self.shift + plus


class Flipped(Conv1D):
    def forward(self, x):
        return super().forward(x) * 3


def made(cls, outputs=CHANNELS, inputs=WIDTH, dtype=torch.float32):
    return seeded(cls, *((outputs, inputs) if issubclass(cls, Conv1D) else (inputs, outputs))).to(dtype)


def tensors(found):
    return found if isinstance(found, tuple) else (found,)


class Observer(nn.Linear):
    """A forward that assigns a buffer and an attribute."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("largest", torch.full((), 0.1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.largest = torch.maximum(self.largest, x.detach().abs().max()) if self.training else self.largest
        return super().forward(x.clamp(-self.largest, self.largest))


def test_what_a_forward_assigns_is_kept():
    net = nn.Sequential(nn.Linear(WIDTH, CHANNELS), nn.ReLU(), made(Observer, WIDTH, CHANNELS))
    plain, x = copy.deepcopy(net), torch.randn(3, WIDTH)
    with_adapter(
        net, S2FTConfig(d_ratio=0.3), couplings=[Coupling.ffn(0, up="0", down="2", channels=CHANNELS)], example=x
    )
    for model in (net, plain):
        model.train()(x)
    assert net[2].calls == plain[2].calls == 1 and torch.equal(net[2].largest, plain[2].largest)
    net[2].calls = 5  # a setting of the plain layer
    assert torch.equal(s2ft.detach(net.eval())(x), plain.eval()(x)) and net[2].calls == 6


@pytest.mark.parametrize("cls", (Scaled, Router, Flipped))
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("units", (dict(start=1, end=4), dict(index=torch.tensor([4, 0, 2]))), ids=("slice", "index"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_own_forward_runs_on_the_merged_weight_bit_for_bit(cls, dim, units, dtype):
    plain = made(cls, dtype=dtype)
    kind, merged = kind_of(plain), copy.deepcopy(plain)
    layer = kind.layers[dim].from_module(plain, **units, delta_dtype=torch.float32)
    nn.init.normal_(layer.s2)
    x = torch.randn(3, WIDTH).to(dtype)
    index = units.get("index", torch.arange(1, 4))
    added = tensors(kind.run_with_delta(plain, x, layer.s2, index, dim))
    got = tensors(layer(x))
    assert all(torch.equal(one, two) for one, two in zip(got, added))
    matrix = kind.matrix(merged)
    matrix.index_copy_(dim, index, (matrix.index_select(dim, index) + layer.s2.detach()).to(dtype))
    assert all(torch.equal(one, two) for one, two in zip(got, tensors(merged(x))))
    assert torch.equal(layer.weight, merged.weight)
    layer.unfuse()
    assert torch.equal(layer.weight, made(cls, dtype=dtype).weight)


@pytest.mark.parametrize("dim", (0, 1))
def test_gradient_of_own_forward_is_that_of_the_weight_at_the_units(dim):
    full, index = made(Scaled, dtype=torch.float64), torch.tensor([4, 0, 2])
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    full(x).square().sum().backward()
    layer = kind_of(full).layers[dim].from_module(made(Scaled, dtype=torch.float64), index=index)
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.s2.grad, full.weight.grad.index_select(dim, index))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["s2"]


class Doubled(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


# forwards that a check on one small input could take for that of nn.Linear
FORWARDS = {
    "noise in training": lambda self, x: F.linear(x, self.weight, self.bias) + self.training * 0.1,
    "another gradient": lambda self, x: F.linear(Doubled.apply(x), self.weight, self.bias),
    "a limit": lambda self, x: F.linear(x.clamp(-100, 100), self.weight, self.bias),
    "no bias": lambda self, x: F.linear(x, self.weight),
    "a little more": lambda self, x: F.linear(x, self.weight, self.bias) * (1 + 1e-6),
    "two outputs": lambda self, x: (F.linear(x, self.weight, self.bias),) * 2,
    "a setting": lambda self, x: F.linear(x, self.weight, self.bias) + self.setting,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_another_forward_is_not_taken_for_that_of_linear(name):
    module = type("Other", (nn.Linear,), {"forward": FORWARDS[name]})(WIDTH, CHANNELS)
    module.setting = 1
    assert not computes_linear(module) and kind_of(module).layers[1] is S2RowOwnForward
    assert [same for same in (Renamed, FalconLinear) if kind_of(made(same)).layers[0] is not S2ColumnLinear] == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = made(FalconLinear), made(Scaled, WIDTH, CHANNELS)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)), plus=self.down.factor)


EXAMPLE = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
COUPLING = Coupling.ffn(0, up="up", down="down", channels=CHANNELS)


def make_net():
    return seeded(Net).eval()


def test_copies_pickles_and_casts_keep_the_tensors_of_the_class():
    model = make_net()
    randomize(
        with_adapter(
            model, S2FTConfig(u_ratio=0.3, d_ratio=0.3, layout="indexed"), couplings=[COUPLING], example=EXAMPLE
        )
    )
    for other in (copy.deepcopy(model.down), saved_and_loaded(model.down)):
        x = torch.randn(3, CHANNELS)
        assert torch.equal(other(x), model.down(x)) and other.scale is not model.down.scale
        other.to(torch.float64)
        assert other(x.double()).dtype is torch.float64
    seen = model.down.seen.item()
    model.to(torch.float64)  # replaces buffers, which the plain layer gets back
    model(EXAMPLE.double())
    assert model.down.seen == seen + 1
    plain = s2ft.detach(model)
    assert plain.down.shift.dtype is plain.down.weight.dtype is torch.float64 and "seen" not in plain.down.state_dict()


def test_out_projection_of_multihead_attention_is_refused_by_name():
    net = nn.Module()
    net.attention = nn.MultiheadAttention(WIDTH, 2)
    net.up = nn.Linear(4, WIDTH)
    coupling = Coupling.ffn(0, up="up", down="attention.out_proj", channels=WIDTH)
    with pytest.raises(ValueError, match="out_proj of nn.MultiheadAttention, which uses the weight without running"):
        s2ft.attach(net, S2FTConfig(d_ratio=0.5), couplings=[coupling], example=torch.zeros(1, 4))
    assert not any(isinstance(module, S2Layer) for module in net.modules())


def test_a_packed_weight_of_a_derived_class_is_refused():
    module = made(Renamed)
    module.weight = nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert kind_of(module).layers is None
