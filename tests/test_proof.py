"""The proof of attach: what the model on hand computes, attached and plain, decides; nothing else is believed."""

import copy
import gc
import random

import pytest
import torch
import torch.nn.functional as F
from support.aliases import ROWS, model_with
from support.inside import copied, couplings_of, examples_examples_of as examples_of, record_of, tiny_config
from support.models import model_of
from support.states import same, with_adapter
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, LlamaConfig

import s2ft
from s2ft import Coupling, S2FTConfig

WIDTH, CHANNELS = 12, 20
RATIOS = dict(u_ratio=0.3, d_ratio=0.3)


class Block(nn.Module):
    """An FFN. `between` computes what is between its two layers, from the module, its input and the channels."""

    def __init__(self, between, number):
        super().__init__()
        self.between, self.number = between, number
        self.up, self.gate, self.down = (
            nn.Linear(WIDTH, CHANNELS),
            nn.Linear(WIDTH, CHANNELS),
            nn.Linear(CHANNELS, WIDTH),
        )
        self.scale, self.mix = nn.Parameter(torch.randn(CHANNELS)), nn.Parameter(torch.randn(CHANNELS, CHANNELS))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("phase", torch.complex(torch.ones(CHANNELS), torch.linspace(0, 2, CHANNELS)))
        self.taken = [self.up.weight]  # by a list that no module knows
        self.teacher = [self.up.weight.detach().clone()]
        self.kept = [self.up]

    def forward(self, x):
        found = self.between(self, x, self.up(x))
        return x + (self.down(found) if found.shape[-1] == CHANNELS else found)


class Stack(nn.Module):
    def __init__(self, between, read=lambda x, blocks: x):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head, self.read = (
            nn.ModuleList(Block(between, i) for i in range(2)),
            nn.Linear(WIDTH, 7),
            read,
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.read(self.head(x), self.blocks)


def couplings():
    return [Coupling.ffn(i, up=f"blocks.{i}.up", down=f"blocks.{i}.down", channels=CHANNELS) for i in range(2)]


def batch():
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def attach(net, layout="permuted", **options):
    options = {"couplings": couplings(), "example": batch(), **options}
    return s2ft.attach(net, S2FTConfig(**RATIOS, layout=layout), **options)


def per_token(function):
    """What is between the layers, in evaluation and training mode."""
    return lambda block, x, h: function(h)


def in_mode(training, function):
    return lambda block, x, h: function(block, h) if block.training == training else h


def counted(block, x, h):
    block.seen.add_(1)
    block.last = h.detach().mean()
    return h.tanh()


RIGHT = {
    "softmax over channels": per_token(lambda h: h.softmax(-1) * 9),
    "norm without weights": per_token(lambda h: F.layer_norm(h, (CHANNELS,))),
    "root mean square": per_token(lambda h: h * h.square().mean(-1, keepdim=True).rsqrt()),
    "logsumexp as gate": per_token(lambda h: h * h.logsumexp(-1, keepdim=True).sigmoid()),
    "squeeze over tokens": per_token(lambda h: h * h.mean(1, keepdim=True).sigmoid()),
    "token shift": per_token(lambda h: h + h.roll(1, 1)),
    "running maximum over tokens": per_token(lambda h: h.cummax(1).values),
    "one kernel for all channels": per_token(lambda h: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2)),
    "Fourier transform over tokens": per_token(lambda h: torch.fft.fft(h, dim=1).real),
    "sorted over tokens": per_token(lambda h: h.sort(1).values),
    "Gram matrix of tokens": per_token(lambda h: (h @ h.transpose(1, 2)).softmax(-1) @ h),
    "only the largest channel": per_token(lambda h: h * F.one_hot(h.argmax(-1), CHANNELS)),
    "clamped by a quantile": per_token(lambda h: h.minimum(h.quantile(0.7, -1, keepdim=True))),
    "straight through": per_token(lambda h: h + (h.sign() - h).detach()),
    "one quantizer for all": in_mode(True, lambda block, h: (h * 8).round() / 8 + h - h.detach()),
    "celu in place": per_token(lambda h: F.celu_(h * 1.0)),
    "double inside": per_token(lambda h: h.double().erf().float()),
    "half inside": per_token(lambda h: h.bfloat16().tanh().float()),
    "whole channels dropped": lambda block, x, h: F.dropout1d(h.transpose(1, 2), 0.5, block.training).transpose(1, 2),
    "alpha dropout": lambda block, x, h: F.alpha_dropout(h, 0.3, block.training),
    "noise of a token": in_mode(True, lambda block, h: h + torch.randn(*h.shape[:-1], 1)),
    "noise of a channel": in_mode(True, lambda block, h: h + torch.randn_like(h)),
    "a layer left out by chance": in_mode(True, lambda block, h: h * float(random.random() < 0.5)),
    "counted": counted,
    "checkpointed": lambda block, x, h: checkpoint(torch.tanh, h, use_reentrant=False),
    "checkpointed, reentrant": lambda block, x, h: checkpoint(torch.tanh, h, use_reentrant=True),
    "thrice": lambda block, x, h: block.up(block.down(block.up(block.down(h).tanh())).tanh()).tanh(),
    "without its gate": lambda block, x, h: h.where(h > block.gate(x).mean(-1, keepdim=True), h * 0.1),
    "a running mean of all": in_mode(True, lambda block, h: h - block.seen.lerp_(h.detach().mean(), 0.1)),
    "polynomial": per_token(lambda h: 0.1 * h**3 - h),
    "vmap": per_token(lambda h: torch.vmap(torch.tanh)(h)),
    "scale from the input": lambda block, x, h: h * x.norm(dim=-1, keepdim=True),
    "read in evaluation mode": lambda block, x, h: h if block.training else F.linear(x, block.up.weight, block.up.bias),
}


class ScaledByNumber(torch.autograd.Function):
    """The identity, whose backward scales each channel by its number."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.linspace(0.5, 1.5, CHANNELS)


def with_gradient_hook(block, x, h):
    h = h.tanh()
    if h.requires_grad:
        h.register_hook(lambda grad: grad * torch.linspace(0.5, 1.5, CHANNELS))
    return h


def counting_channels(block, h):
    block.mean.lerp_(h.detach().mean((0, 1)), 0.1)
    return h.tanh()


MOVES = {  # wrong where units move
    "a backward by number": lambda block, x, h: ScaledByNumber.apply(h),
    "a gradient hook by number": with_gradient_hook,
    "no gradient for some channels": lambda block, x, h: torch.cat([h[..., :4].detach(), h[..., 4:]], -1),
    "a mean of each channel": in_mode(True, counting_channels),
    "reversed channels": per_token(lambda h: h + h.flip(-1)),
    "neighbours": per_token(lambda h: h + h.roll(1, -1)),
    "pooled over neighbours": per_token(lambda h: F.max_pool1d(h, 3, 1, 1)),
    "times its number": per_token(lambda h: h * torch.arange(CHANNELS)),
    "second half added": per_token(lambda h: h + torch.cat([h[..., 10:], h[..., :10]], -1)),
    "the seventh as gate": per_token(lambda h: h * h[..., 7:8].sigmoid()),
    "the last left out": per_token(lambda h: h * (torch.arange(CHANNELS) < 15)),
    "signs by parity": per_token(lambda h: h * (1 - 2 * (torch.arange(CHANNELS) % 2))),
    "a parameter for each": lambda block, x, h: h * block.scale,
    "mixed": lambda block, x, h: h @ block.mix,
    "Fourier transform over channels": per_token(lambda h: torch.fft.fft(h, dim=-1).abs()),
    "running logsumexp": per_token(lambda h: h.logcumsumexp(-1)),
    "norm of groups": per_token(lambda h: F.group_norm(h.flatten(0, 1), 4).view_as(h)),
    "convolved over channels": per_token(
        lambda h: F.conv1d(h.flatten(0, 1)[:, None], torch.ones(1, 1, 3), padding=1)[:, 0].view_as(h)
    ),
    "number of the largest": per_token(lambda h: h + h.argmax(-1, keepdim=True)),
    "reads the third": per_token(lambda h: h + h[..., 3:4]),
    "sorted channels": per_token(lambda h: h.sort(-1).values),
    "input added by number": lambda block, x, h: torch.cat([h[..., :WIDTH] + x, h[..., WIDTH:]], -1),
    "grid of channels": per_token(lambda h: h.unflatten(-1, (4, 5)).transpose(-1, -2).flatten(-2)),
    "cumulative difference": per_token(lambda h: F.pad(h.diff(dim=-1), (0, 1))),
    "in evaluation mode only": in_mode(False, lambda block, h: h * block.scale),
    "in training mode only": in_mode(True, lambda block, h: h * block.scale),
    "in the second block only": lambda block, x, h: h * block.scale if block.number else h,
    "every second token": lambda block, x, h: torch.where(torch.arange(5)[:, None] % 2 == 0, h, h * block.scale),
    "a hundredth": per_token(lambda h: h + 0.01 * h.roll(3, -1)),
    "phase of each": lambda block, x, h: (h * block.phase).real + (h * block.phase).imag.tanh(),
    "a fixed drop": in_mode(
        True, lambda block, h: h * (torch.rand(CHANNELS, generator=torch.Generator().manual_seed(0)) > 0.5)
    ),
    "a copy of the layer": lambda block, x, h: h * F.linear(x, block.teacher[0]),
}
PAST = {  # trained as one function and merged as another, in every layout
    "never called": lambda block, x, h: F.linear(x, F.normalize(block.up.weight)) + 0 * h,
    "in training mode": lambda block, x, h: F.linear(x, block.up.weight, block.up.bias) if block.training else h,
    "known from a list": lambda block, x, h: h * F.linear(x, block.taken[0]),
    "its norm": lambda block, x, h: h * vars(block)["_modules"]["up"].weight.norm(),
    "a layer in a list": lambda block, x, h: h * block.kept[0](x),
    "addmm": lambda block, x, h: torch.addmm(block.down.bias, h.flatten(0, 1), block.down.weight.t()).view_as(x),
}
READS = {
    "lowest number": lambda y, blocks: y.masked_fill(torch.arange(7) == 0, torch.finfo(y.dtype).min),
    "minus infinity": lambda y, blocks: y.masked_fill(torch.arange(7) < 5, -torch.inf),
    "NaN in a row": lambda y, blocks: y.masked_fill(torch.arange(5)[:, None] == 1, torch.nan),
    "nearly all masked": lambda y, blocks: y.masked_fill(torch.arange(7) > 0, -1e12),
    "masks added": lambda y, blocks: y - 1e9 * (torch.arange(7) < 2),
    "a scalar": lambda y, blocks: y.square().mean(),
    "tiny": lambda y, blocks: y * 1e-20,
    "huge": lambda y, blocks: y * 1e20,
    "several": lambda y, blocks: {"logits": y, "none": None, "more": (y.tanh(), y.argmax(-1), y[:0])},
    "complex": lambda y, blocks: torch.complex(y, y.roll(1, -1)),
}


def steps(net):
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        net(batch()).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()


def check_trained_is_merged(net, base):
    steps(net)
    trained = copy.deepcopy(net).eval()
    torch.testing.assert_close(trained(batch()), s2ft.merge(copy.deepcopy(net)).eval()(batch()), rtol=1e-4, atol=1e-4)
    restored = s2ft.detach(net)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, restored.get_parameter(name)), name


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_module_trains_what_it_merges(name):
    for layout in ("permuted", "indexed"):
        net = Stack(RIGHT[name])
        base, x = copy.deepcopy(net), batch()
        assert ("training mode was not proved" in attach(net, layout).unproved) == (
            name == "noise of a channel" and layout == "permuted"
        )
        torch.testing.assert_close(net.eval()(x), base.eval()(x), rtol=1e-4, atol=1e-4)
        check_trained_is_merged(net, base)


@pytest.mark.parametrize("name", MOVES)
def test_channels_that_have_numbers_may_not_move(name):
    net = Stack(MOVES[name])
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=r"attach would change what the model computes: in (training|evaluation) mode"):
        attach(net)
    assert same(net, before) and s2ft.list_adapters(net) == []
    attach(net, "indexed")
    check_trained_is_merged(net, before)


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
@pytest.mark.parametrize("name", PAST)
def test_a_weight_that_is_read_past_its_layer_is_refused(name, layout):
    net = Stack(PAST[name])
    before = copy.deepcopy(net)
    words = r"computes with the weight of blocks\.0\.(up|down) without running|Does it keep a layer in a list"
    with pytest.raises(ValueError, match=words):
        attach(net, layout)
    assert same(net, before) and s2ft.list_adapters(net) == []


@pytest.mark.parametrize("name", READS)
def test_what_the_outputs_hold_hides_nothing(name):
    attach(Stack(RIGHT["polynomial"], READS[name]))
    leak = Stack(RIGHT["polynomial"], READS[name])
    leak.head = Leaking(leak)
    with pytest.raises(ValueError, match="an output changes"):
        attach(leak)


class Leaking(nn.Module):
    """A head that adds channels by their number."""

    def __init__(self, net):
        super().__init__()
        self.net, self.linear = [net], nn.Linear(WIDTH, 7)

    def forward(self, x):
        return self.linear(x) + self.net[0].blocks[0].up(x)[..., 7:14]


def test_discovery_of_odd_modules_is_never_wrong():
    for name, between in {**MOVES, **PAST}.items():
        net, x = Stack(between), batch()
        base = copy.deepcopy(net)
        try:
            keys = {p.key for coupling in couplings_of(net, example=x) for p in coupling.projections}
            s2ft.attach(net, S2FTConfig(**{f"{key}_ratio": 0.3 for key in keys}), example=x)
        except ValueError:
            assert same(net, base), name
            continue
        for mode in (True, False):
            torch.testing.assert_close(net.train(mode)(x), base.train(mode)(x), rtol=1e-4, atol=1e-4, msg=name)


# ---- one hazard each -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_a_fast_path_reads_the_trained_weights(layout):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 5, 16)
    s2ft.attach(net, S2FTConfig(d_ratio=0.25, u_ratio=0.25, layout=layout), example=x)
    with torch.no_grad():
        for mount in record_of(net).mounts.values():
            mount.layer.s2.normal_()
        torch.testing.assert_close(net(x), s2ft.merge(copy.deepcopy(net))(x))


class Numbered(nn.Module):
    """A foreign module with the names of a declared family, whose channels are numbered."""

    def __init__(self, width, channels):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, channels), nn.Linear(width, channels)
        self.down_proj, self.act_fn = nn.Linear(channels, width), nn.SiLU()

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).cumsum(-1))


@pytest.mark.parametrize("ffn_kernel", (True, False))
def test_a_declared_family_with_a_foreign_module_is_refused(ffn_kernel):
    model = model_of("llama")
    model.model.layers[1].mlp = Numbered(24, 52)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"the output of model\.layers\.1\.mlp.*ffn coupling of layer 1"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.2, ffn_kernel=ffn_kernel))
    assert same(model, before) and "forward" not in vars(model.model.layers[1].mlp)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", ("llama", "mixtral"))
def test_rounding_is_no_difference(case, dtype):
    for layout in ("permuted", "indexed"):
        s2ft.attach(model_of(case).to(dtype), S2FTConfig(d_ratio=0.1, o_ratio=0.25, layout=layout), verify=True)


def test_offloaded_weights_are_refused():
    import accelerate

    adapter = s2ft.get_adapter(with_adapter(model_of("llama"), S2FTConfig(d_ratio=0.2)), "default")
    model = accelerate.cpu_offload(model_of("llama"), torch.device("cpu"))
    for act in (lambda: s2ft.attach(model, S2FTConfig(d_ratio=0.2)), lambda: s2ft.load_adapter(model, adapter)):
        with pytest.raises(ValueError, match="accelerate keeps the weights of .* elsewhere.*remove_hook_from_module"):
            act()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    s2ft.attach(model, S2FTConfig(d_ratio=0.2))


def test_a_twin_keeps_imaginary_parts():
    twin = copied(Stack(RIGHT["polynomial"]))
    assert twin.blocks[0].phase.dtype == torch.complex128
    assert torch.equal(twin.blocks[0].phase.imag.float(), torch.linspace(0, 2, CHANNELS))


@pytest.mark.parametrize(("depth", "odd", "others"), [(3, [], [2]), (12, [7], [2, 7])])
def test_lists_that_name_layers_are_cut_with_the_layers(depth, odd, others):
    """A twin that then lacks a kind of block is made again with more layers."""
    config = LlamaConfig(num_hidden_layers=16)
    config.odd_layers, config.other_blocks, config.widths = [7], [2, 7], [7]
    tiny = tiny_config(config, True, depth)
    assert (tiny.num_hidden_layers, tiny.odd_layers, tiny.other_blocks, tiny.widths) == (depth, odd, others, [7])


def test_what_the_example_does_not_reach_is_named():
    net = Stack(RIGHT["polynomial"])
    net.blocks.append(Block(RIGHT["polynomial"], 2))
    net.blocks[2].forward = lambda x: x
    third = Coupling.ffn(2, up="blocks.2.up", down="blocks.2.down", channels=CHANNELS)
    with pytest.raises(ValueError, match=r"does not reach blocks\.2\.up and 1 more"):
        attach(net, couplings=[*couplings(), third])
    assert s2ft.list_adapters(net) == []


def test_an_expert_that_gets_no_token_is_named():
    net = Stack(RIGHT["polynomial"])
    net.experts = nn.ModuleList([Block(RIGHT["polynomial"], 2)])  # to which no token is sent
    third = Coupling.ffn(2, up="experts.0.up", down="experts.0.down", channels=CHANNELS)
    notes = attach(net, couplings=[*couplings(), third]).unproved
    assert "the example gives them no token: experts.0.up and 1 more" in notes


@pytest.mark.parametrize("kind,option", (("bart", "decoder_layerdrop"), ("hubert", "layerdrop")))
def test_blocks_that_training_drops_by_chance_are_proved_too(kind, option):
    model = model_with(CONFIG_MAPPING[kind](**{**ROWS[kind], option: 1.0}))
    before = [getattr(part, "layerdrop", None) for part in (model.config, *model.modules())]
    assert s2ft.attach(model, S2FTConfig(d_ratio=0.5), verify=True).unproved == ""
    assert [getattr(part, "layerdrop", None) for part in (model.config, *s2ft.detach(model).modules())] == before


def test_old_gradients_are_no_fault_and_go():
    """An optimizer of all parameters would step with those of frozen weights."""
    net = Stack(RIGHT["polynomial"])
    net(batch()).sum().backward()
    attach(net)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_without_an_example_nothing_is_proved_and_the_report_says_so():
    report = attach(Stack(MOVES["mixed"]), example=None)
    assert "nothing was proved" in str(report) and "Pass example=" in report.unproved
    with pytest.raises(ValueError, match="pass example="):
        attach(Stack(RIGHT["counted"]), example=None, verify=True)


def test_an_example_of_sound_is_short_even_where_the_model_takes_long_ones():
    model = model_with(CONFIG_MAPPING["wav2vec2-bert"](**ROWS["wav2vec2-bert"]))
    assert model.config.max_source_positions == 5000 and max(next(examples_of(model))["input_features"].shape) == 128
    model = model_with(CONFIG_MAPPING["wav2vec2-conformer"](**ROWS["wav2vec2-conformer"]))  # a frame is 4 samples
    assert next(one["input_values"] for one in examples_of(model) if "input_values" in one).shape == (2, 100)


def test_verify_false_runs_nothing():
    assert attach(Stack(lambda *_: pytest.fail("it ran")), verify=False).unproved == ""


def test_loading_an_adapter_to_train_it_proves_it_too():
    net = Stack(RIGHT["polynomial"])
    attach(net)
    adapter = s2ft.get_adapter(net, "default")
    for verify, between in ((None, RIGHT["polynomial"]), (False, MOVES["mixed"])):
        s2ft.load_adapter(Stack(between), adapter, trainable=True, verify=verify, example=batch())
    with pytest.raises(ValueError, match="attach would change what the model computes"):
        s2ft.load_adapter(Stack(MOVES["mixed"]), adapter, trainable=True, example=batch())


def test_four_runs_prove_a_language_model_and_nothing_is_kept():
    model, calls = model_of("llama").train(), []
    model.register_forward_hook(lambda *_: calls.append(model.training))
    state = torch.get_rng_state()
    s2ft.attach(model, S2FTConfig(d_ratio=0.2))
    assert calls == [False, True, True, False] and torch.equal(torch.get_rng_state(), state)
    assert all(not one.layer.s2.any() and one.layer.s2.grad is None for one in record_of(model).mounts.values())
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one).__name__ == "Proof"]


class Normed(Block):
    """Batch norm, attributes and an error that may come in any run."""

    fails_at = runs = 0

    def __init__(self, between, number):
        super().__init__(between, number)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        Normed.runs += 1
        self.last = x
        x = super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))
        if Normed.runs == Normed.fails_at:
            raise KeyboardInterrupt
        return x


def test_an_interrupt_in_any_run_leaves_the_model_as_it_was():
    for fails_at in (*range(1, 20), 0):
        net = Stack(RIGHT["counted"])
        net.blocks = nn.ModuleList(Normed(RIGHT["counted"], i) for i in range(2))
        net.blocks[0].eval()
        before, modes = copy.deepcopy(net), [module.training for module in net.modules()]
        Normed.runs, Normed.fails_at, state = 0, fails_at, random.getstate()
        try:
            attach(net)
            ended = True
        except KeyboardInterrupt:
            ended = False
        assert all(map(torch.equal, net.buffers(), before.buffers())) or ended
        assert not hasattr(net.blocks[0], "last") and random.getstate() == state
        if ended:
            s2ft.detach(net)
        assert same(net, before) and all(p.requires_grad for p in net.parameters())
        assert [module.training for module in net.modules()] == modes
        assert not any(m._forward_hooks for m in net.modules())
    assert ended and 10 <= Normed.runs < 20


@pytest.mark.parametrize("selection, data", [("random", None), ("activation", [batch()])])
def test_an_interrupt_right_after_a_hook_is_registered_leaves_no_hook(monkeypatch, selection, data):
    def interrupted(module, hook):
        register(module, hook)
        raise KeyboardInterrupt

    net, register = Stack(RIGHT["counted"]), nn.Module.register_forward_hook
    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s2ft.attach(
            net, S2FTConfig(**RATIOS, selection=selection), couplings=couplings(), example=batch(), calibration=data
        )
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "swin_t", "mobilenet_v3_small", "densenet121"])
def test_models_of_torchvision(name):
    models = pytest.importorskip("torchvision").models
    net = getattr(models, name)(num_classes=10, **({"image_size": 64} if name == "vit_b_16" else {}))
    x = torch.randn(2, 3, 64, 64)
    base = copy.deepcopy(net)
    keys = {p.key for coupling in couplings_of(net, example=x) for p in coupling.projections}
    s2ft.attach(net, S2FTConfig(**{f"{key}_ratio": 0.3 for key in keys}), example=x, verify=True)
    torch.testing.assert_close(net.eval()(x), base.eval()(x), rtol=1e-3, atol=1e-3)
    assert same(s2ft.detach(net), base)
