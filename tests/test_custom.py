"""Couplings that a user describes are verified before a weight changes."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.aliases import alias_of
from support.inside import Projection, Vector, record_of
from support.models import ALL_RATIOS, LAYOUTS
from support.nets import seeded
from support.states import same, with_adapter, with_loaded
from support.tolerances import GEMM
from test_life_cycle import Subject, live_natively
from torch import nn
from transformers.pytorch_utils import Conv1D

import s2ft
from s2ft import Coupling, S2FTConfig

HEADS, WIDTH, CHANNELS = 4, 5, 30  # heads of five elements, in a model of twelve


class Bias(nn.Module):
    """A separate bias after a linear layer."""

    def __init__(self, size):
        super().__init__()
        self.value = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x + self.value


class Block(nn.Module):
    """An MLP with a separate bias, and attention whose queries have a norm over all heads."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, CHANNELS), nn.Linear(CHANNELS, 12)
        self.other = nn.Linear(12, CHANNELS)
        self.shift, self.dropout = Bias(CHANNELS), nn.Dropout(0.5)
        self.q, self.k, self.v = (nn.Linear(12, HEADS * WIDTH) for _ in range(3))
        self.o, self.norm = nn.Linear(HEADS * WIDTH, 12), nn.LayerNorm(HEADS * WIDTH)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for y in (self.norm(self.q(x)), self.k(x), self.v(x))
        )
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(self.dropout(torch.relu(self.shift(self.up(x)))) + torch.tanh(self.other(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def couplings():
    found = []
    for i in range(2):
        path = f"blocks.{i}"
        found += [
            Coupling(
                "ffn",
                i,
                (Projection("u", f"{path}.up", CHANNELS, 1, 0), Projection("g", f"{path}.other", CHANNELS, 1, 0)),
                Projection("d", f"{path}.down", CHANNELS, 1, 1),
                (Vector(f"{path}.shift.value", 1),),
            ),
            Coupling(
                "attention",
                i,
                tuple(Projection(key, f"{path}.{key}", HEADS, WIDTH, 0) for key in "qkv"),
                Projection("o", f"{path}.o", HEADS, WIDTH, 1),
                (Vector(f"{path}.norm.weight", WIDTH), Vector(f"{path}.norm.bias", WIDTH)),
            ),
        ]
    return found


def net(dtype=torch.float32):
    return seeded(Net).to(dtype)  # in training mode, with dropout


def plain_net():
    model = Net()
    for block in model.blocks:
        block.dropout = nn.Identity()
    return model


def example(dtype=torch.float32):
    return torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ("separate", "fused"))
def test_the_life_of_a_users_own_model(kind, layout, tmp_path):
    """`fused` has q, k and v in one weight."""
    make, given = (plain_net, couplings()) if kind == "separate" else (Fused, [fused_coupling()])
    config = {**ALL_RATIOS} if kind == "separate" else dict(q_ratio=0.25, v_ratio=0.5, o_ratio=0.25)
    live_natively(
        Subject(
            lambda: seeded(make).eval(),
            {**config, "layout": layout},
            lambda model: model(example()),
            dict(couplings=given, example=example()),
        ),
        tmp_path,
    )


def test_the_couplings_of_a_loaded_adapter_may_be_given_again():
    config = S2FTConfig(i_ratio=0.25)
    adapter = s2ft.get_adapter(with_adapter(net(), config, couplings=couplings(), example=example()), "default")
    model = with_loaded(net(), adapter, "loaded")
    assert s2ft.attach(model, config, couplings=couplings(), example=example()).trainable == adapter.parameters
    with pytest.raises(ValueError, match="couplings differ from those of the loaded adapters"):
        s2ft.attach(with_loaded(net(), adapter, "loaded"), config, couplings=couplings()[:1], example=example())


def changed(index, **fields):
    """The couplings of `Net`, one of them changed."""
    found = couplings()
    found[index] = replace(found[index], **fields)
    return found


def with_heads(count, unit, index=1):
    whole = couplings()[index]
    return changed(
        index,
        producers=tuple(replace(p, count=count, unit=unit) for p in whole.producers),
        consumer=replace(whole.consumer, count=count, unit=unit),
        vectors=(),
    )


def crossed():
    """Couplings that join the first layers of each MLP to the last layer of the other."""
    first, one, second, other = couplings()
    return [replace(first, consumer=second.consumer), one, replace(second, consumer=first.consumer), other]


WRONG = {
    "another's consumer": (crossed, "ffn coupling of layer . .*blocks.0.up.*blocks.1.down|blocks.1.up.*blocks.0.down"),
    "a producer missing": (lambda: changed(0, producers=couplings()[0].producers[:1]), "ffn coupling of layer 0"),
    "unit of heads": (lambda: with_heads(5, 4), "attention coupling of layer 0.*5 units"),
    "unit of later heads": (lambda: with_heads(10, 2, index=3), "attention coupling of layer 1.*10 units"),
    "bias missed": (lambda: changed(2, vectors=()), "ffn coupling of layer 1.*norm or bias"),
    "norm missed": (lambda: changed(1, vectors=()), "attention coupling of layer 0"),
    "half of the norm": (lambda: changed(3, vectors=couplings()[3].vectors[:1]), "attention coupling of layer 1"),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_coupling_is_refused_and_named(wrong, dtype):
    make, message = WRONG[wrong]
    model, ratios = net(dtype), dict(d_ratio=0.2, o_ratio=0.4)
    base, modes = copy.deepcopy(model), [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        s2ft.attach(model, S2FTConfig(**ratios), couplings=make(), example=example(dtype))
    assert same(model, base) and [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())
    s2ft.attach(model, S2FTConfig(**ratios, layout="indexed"), couplings=make(), example=example(dtype))
    assert same(s2ft.detach(model), base)  # where no unit moves, a wrong coupling does no harm
    s2ft.attach(model, S2FTConfig(**ratios), couplings=couplings(), example=example(dtype))


def test_a_model_that_writes_into_its_input():
    class Writes(Net):
        def forward(self, x):
            return super().forward(x.add_(1.0))

    given = example()
    s2ft.attach(Writes(), S2FTConfig(d_ratio=0.2), couplings=couplings(), example=given)
    assert torch.equal(given, example())


def test_verification_finds_a_fault_of_attach_itself(monkeypatch):
    """A fault that occurs after the trial of the couplings also leaves the base unchanged."""
    from s2ft import S2ColumnLinear

    model, real = net(), S2ColumnLinear.forward
    monkeypatch.setattr(S2ColumnLinear, "forward", lambda self, x: real(self, x) * 1.5)
    with pytest.raises(ValueError, match="attach would change what the model computes"):
        s2ft.attach(model, S2FTConfig(u_ratio=0.2), couplings=couplings(), example=example())
    assert same(model, net()) and all(p.requires_grad for p in model.parameters())


# ---- a convolutional network ---------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Convolutions with a norm and a depthwise convolution between them, then linear layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.second = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.third, self.head, self.out = nn.Conv2d(8, 12, 1), nn.Linear(12 * 9, 20), nn.Linear(20, 5)
        for tensor in (*self.norm.parameters(), self.norm.running_mean, self.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x):  # [N, 3, 6, 6]
        x = self.second(self.depth(torch.relu(self.norm(self.first(x)))))
        return self.out(torch.relu(self.head(torch.relu(self.third(torch.relu(x))).flatten(1))))


def image():
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def conv_couplings():
    between = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    return [
        Coupling(
            "ffn",
            0,
            (Projection("u", "first", 16, 1, 0),),
            Projection("d", "second", 16, 1, 1),
            tuple(Vector(path, 1) for path in (*between, "depth.weight", "depth.bias")),
        ),
        Coupling("ffn", 1, (Projection("u", "third", 12, 1, 0),), Projection("d", "head", 12, 9, 1)),
    ]


def conv_net():
    return seeded(ConvNet).eval()


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_convolutional_network_all_the_way(layout, memory_format, tmp_path):
    config, given = dict(u_ratio=0.25, d_ratio=0.5, layout=layout), dict(couplings=conv_couplings(), example=image())
    base = conv_net().to(memory_format=memory_format)
    live_natively(Subject(lambda: copy.deepcopy(base), config, lambda model: model.eval()(image()), given), tmp_path)
    model = copy.deepcopy(base)
    report = s2ft.attach(model, S2FTConfig(**config), **given)
    assert [(row.projection, row.units, row.parameters) for row in report.rows] == [
        ("first", "4 of 16 channels", 4 * 27),
        ("second", "8 of 16 channels", 8 * 8 * 9),
        ("third", "3 of 12 channels", 3 * 8),
        ("head", "6 of 12 channels", 20 * 6 * 9),
    ]
    assert report.total == sum(p.numel() for p in base.parameters())
    assert "running statistics of 1 modules, the first of them norm" in str(report)
    moved = {move.coupling.consumer.path for move in record_of(model).moves}
    assert moved == ({"second", "head"} if layout == "permuted" else set())
    with s2ft.disable_adapters(model), torch.autocast("cpu", torch.bfloat16):
        rtol, atol = GEMM[torch.bfloat16] if layout == "permuted" else (0, 0)  # sums in another order round differently
        torch.testing.assert_close(model(image()), base(image()), rtol=rtol, atol=atol)


@pytest.mark.parametrize("missing", range(6))
def test_a_missing_norm_or_depthwise_convolution_is_found(missing):
    first, second = conv_couplings()
    first = replace(first, vectors=first.vectors[:missing] + first.vectors[missing + 1 :])
    model = conv_net()
    found = "the output of second changes .* the ffn coupling of layer 0 .first to second|the buffer norm.running_"
    with pytest.raises(ValueError, match=f"({found}).*vectors"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.5), couplings=[first, second], example=image())
    assert same(model, conv_net())


@pytest.mark.parametrize("metric", ("weight", "activation", "product"))
def test_selecting_in_a_convolutional_network(metric):
    data = None if metric == "weight" else [image()]
    config = S2FTConfig(u_ratio=0.25, d_ratio=0.5, selection=metric, match_lora_rank=None)
    model = conv_net()
    selection = s2ft.select(model, config, data, couplings=conv_couplings())
    scores = {
        "weight": model.second.weight.square().sum((0, 2, 3)).sqrt(),
        "activation": model.depth(torch.relu(model.norm(model.first(image())))).square().sum((0, 2, 3)).sqrt(),
    }
    scores["product"] = scores["weight"] * scores["activation"]
    assert torch.equal(selection["second"], scores[metric].topk(8).indices.sort().values) and same(model, conv_net())


# ---- weights that hold several projections -------------------------------------------------------------------


class Fused(nn.Module):
    """Attention with q, k and v in one weight, head by head, as in a Conv1D of transformers."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = Conv1D(3 * HEADS * WIDTH, 12), nn.Linear(HEADS * WIDTH, 12)
        nn.init.normal_(self.qkv.weight)
        nn.init.normal_(self.qkv.bias)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, WIDTH)).permute(3, 0, 2, 1, 4)
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def fused_coupling(**change):
    producers = tuple(
        Projection(key, "qkv", HEADS, WIDTH, 0, start=i * WIDTH, stride=3 * WIDTH, size=3 * HEADS * WIDTH)
        for i, key in enumerate("qkv")
    )
    producers = tuple(replace(p, **change) for p in producers)
    return Coupling("attention", 0, producers, Projection("o", "o", HEADS, WIDTH, 1))


SHARED = {
    "overlap": (dict(start=0), "an element of qkv is in two"),
    "too long": (dict(stride=4 * WIDTH), "must end within size 60, and it ends at element"),
    "size alone": (dict(size=61), "expected a weight with 61 in dim 0"),
    "no size": (dict(size=None), "qkv must have size, .* with start or stride"),
    "start": (dict(start=-1), "start of qkv must be a whole number of at least 0"),
    "stride": (dict(stride=0), "stride of qkv must be"),
}


@pytest.mark.parametrize("bad", SHARED)
def test_invalid_shared_weights_are_refused(bad):
    change, message = SHARED[bad]
    with pytest.raises(ValueError, match=message):
        s2ft.attach(Fused(), S2FTConfig(q_ratio=0.5), couplings=[fused_coupling(**change)], example=example())


UP, DOWN = couplings()[0].producers[0], couplings()[0].consumer
BAD = {
    "none": ([], TypeError, "at least one"),
    "no list": (couplings()[0], TypeError, "must be a list"),
    "no coupling": ([UP], TypeError, r"couplings\[0\] must be an s2ft.Coupling, got Projection"),
    "no producer": (changed(1, producers=()), ValueError, r"couplings\[1\]: vectors are reordered with the units"),
    "no sides": (changed(0, producers=(), consumer=None), ValueError, "exactly one projection; got 0 producers"),
    "one side of two": (changed(0, producers=(UP, UP), consumer=None), ValueError, "got 2 producers and no consumer"),
    "one side of another key": ([Coupling("linear", 0, (UP,), None)], ValueError, "one of l in a one-sided coupling"),
    "key": (changed(0, producers=(replace(UP, key="x"),)), ValueError, "one of q, k, v, u, g on this side, got 'x'"),
    "side": (changed(0, consumer=replace(DOWN, key="u")), ValueError, "one of o, d on this side"),
    "dim": (changed(0, consumer=replace(DOWN, dim=0)), ValueError, "blocks.0.down must have dim 1"),
    "count": (changed(0, consumer=replace(DOWN, count=0)), ValueError, "count of blocks.0.down"),
    "other count": (changed(0, consumer=replace(DOWN, count=31)), ValueError, "31 = 31 units of 1 in dim 1"),
    "layer": (changed(0, layer=-1), ValueError, "layer must be"),
    "twice": (couplings() + couplings()[:1], ValueError, "blocks.0.up is there twice"),
    "missing module": (changed(0, consumer=replace(DOWN, path="blocks.0.dwon")), ValueError, "no module blocks.0.dwon"),
    "a name that can't be saved": (
        changed(0, consumer=replace(DOWN, path="blocks.0.do wn")),
        ValueError,
        "'blocks.0.do wn' is not the name of a projection",
    ),
    "missing vector": (
        changed(0, vectors=(Vector("blocks.0.shift", 1),)),
        ValueError,
        "no parameter or buffer blocks.0.shift",
    ),
    "misshapen vector": (changed(0, vectors=(Vector("blocks.0.shift.value", 2),)), ValueError, "30 units of 2"),
    "block": (changed(0, block="blocks.0"), ValueError, "block and activation"),
}


@pytest.mark.parametrize("bad", BAD)
def test_invalid_couplings_are_refused(bad):
    given, error, message = BAD[bad]
    model = net()
    with pytest.raises(error, match=message):
        s2ft.attach(model, S2FTConfig(d_ratio=0.2), couplings=given, example=example())
    assert same(model, net()) and all(p.requires_grad for p in model.parameters())


def test_an_encoder_of_pytorch_gives_gradients_in_evaluation_mode():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 40, batch_first=True), 2).eval()
    with_adapter(net, s2ft.S2FTConfig(d_ratio=0.2), example=(x := torch.randn(2, 5, 16)))
    net(x).square().sum().backward()
    assert all(layer.linear2.s2.grad.any() for layer in net.layers)
    hooks = net.layers[0].linear2._forward_pre_hooks
    s2ft.detach(net)
    assert not hooks and not net.layers[0].linear2._forward_pre_hooks


def test_a_registered_function_may_yield_and_layers_without_the_projection_are_refused():
    s2ft.register_architecture("yields")(lambda model: iter(couplings()))
    model = net()
    model.config = SimpleNamespace(model_type="yields")
    assert s2ft.plan(model, S2FTConfig(d_ratio=0.2)).trainable == 2 * 6 * 12
    with pytest.raises(ValueError, match="d_ratio requests .* the layers to train do not have: there are l, so"):
        s2ft.plan(alias_of("nemotron_h"), S2FTConfig(d_ratio=0.2, layers=[0]))
