"""Experts: the trainable layer alone, and properties that only a mixture has."""

import copy
from functools import wraps
from types import FunctionType

import pytest
import torch
from accelerate import dispatch_model
from support.aliases import alias_of
from support.inside import EXPERTS, experts_forward
from support.models import ALL_RATIOS, SHAPE, fit, model_of, output_of, randomized, ratios_for, train
from support.nets import doubled
from support.states import randomize, same, with_adapter
from support.tolerances import relative_difference
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import s2ft
from s2ft import Coupling, S2FTConfig


def test_an_expert_without_tokens():
    """Its units get a gradient of zeros, other experts get theirs. A batch without tokens gives an empty output."""
    experts = with_adapter(model_of("mixtral"), S2FTConfig(d_ratio=0.25)).model.layers[0].mlp.experts
    experts(torch.randn(5, 24), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)).sum().backward()
    first, second, third = experts.down_proj.s2.grad.split(experts.down_proj.counts, 1)
    assert first.abs().sum() > 0 and second.abs().sum() > 0 and torch.equal(third, torch.zeros_like(third))
    assert experts(torch.randn(0, 24), torch.empty(0, 2, dtype=torch.int64), torch.rand(0, 2)).shape == (0, 24)


@pytest.mark.parametrize("dim", (0, 1))
def test_a_product_that_leaves_values_in_empty_groups_gives_no_gradient(dim, monkeypatch):
    """As PyTorch's product of groups does on compute capability 10: pytorch#172439. An optimizer would follow them."""
    grouped_mm = nn.functional.grouped_mm

    def with_leftovers(a, b, *, offs):
        y = grouped_mm(a, b, offs=offs)
        if y.dim() == 3:
            y[offs.diff(prepend=offs.new_zeros(1)) == 0] = 7.0
        return y

    monkeypatch.setattr(nn.functional, "grouped_mm", with_leftovers)
    weight = torch.randn(4, 16, 8, dtype=torch.bfloat16)
    index = {expert: torch.arange(expert, expert + 3) for expert in range(4)}
    layer = EXPERTS.layers[dim](nn.Parameter(weight), index, torch.float32)
    layer(torch.randn(5, 8, dtype=torch.bfloat16), torch.tensor([0, 2, 2, 5], dtype=torch.int32)).sum().backward()
    gets_gradient = [bool(part.any()) for part in layer.s2.grad.split(layer.counts, dim)]
    assert gets_gradient == [False, True, False, True]


def test_tokens_of_experts_of_other_devices_add_nothing():
    """With expert parallelism, such experts have the numbers after those of this device."""
    model = with_adapter(model_of("mixtral"), S2FTConfig(d_ratio=0.25, u_ratio=0.25))
    experts = model.model.layers[0].mlp.experts
    for layer in (experts.gate_up_proj, experts.down_proj):
        nn.init.normal_(layer.s2, std=0.1)
    x, weights = torch.randn(5, 24), torch.rand(5, 2)
    chosen = torch.tensor([[0, 3], [3, 3], [2, 1], [3, 0], [1, 0]])  # there are 3 experts here
    grads = []
    same = chosen.masked_fill(chosen == 3, 0), weights.masked_fill(chosen == 3, 0.0)  # expert 0 at weight 0
    for masked, routed in ((False, same), (True, (chosen, weights))):
        experts._is_expert_parallel = masked
        given = x.clone().requires_grad_()
        y = experts(given, *routed)
        y.square().sum().backward()
        grads.append((y.detach(), given.grad, experts.down_proj.s2.grad, experts.gate_up_proj.s2.grad))
        model.zero_grad()
    assert all(relative_difference(ours, theirs) <= 1e-5 for ours, theirs in zip(*grads))


def test_experts_forward_equals_that_of_transformers():
    """Outputs are those of transformers' grouped_mm, bit for bit, also with effective weights after a merge."""
    model = model_of("qwen3-moe")
    model.set_experts_implementation("grouped_mm")
    experts = model.model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(9, 24), torch.randint(4, (9, 2)), torch.rand(9, 2)
    assert torch.equal(experts_forward(experts, x, chosen, weights), experts(x, chosen, weights))
    fit(with_adapter(model, S2FTConfig(d_ratio=0.25, u_ratio=0.25, layout="indexed", ffn_kernel=False)), 2)
    trained = experts(x, chosen, weights)
    s2ft.merge(model)
    assert torch.equal(trained, experts(x, chosen, weights))


@pytest.mark.parametrize("act", ("silu", "gelu", "gelu_new"))
def test_the_kernel_between_the_products(act):
    """act_mul is used if the module computes act(gate) * up by an activation that it has, and gives the same."""
    from transformers import MixtralConfig

    config = MixtralConfig(**{**SHAPE, "intermediate_size": 56, "hidden_act": act}, num_key_value_heads=4)
    model = with_adapter(randomized(AutoModelForCausalLM, config), S2FTConfig(d_ratio=0.25))
    experts = model.model.layers[0].mlp.experts
    assert experts.forward.keywords.get("activation") == (None if act == "gelu_new" else act)
    x, chosen, weights = torch.randn(9, 24), torch.randint(8, (9, 2)), torch.rand(9, 2)
    assert relative_difference(experts(x, chosen, weights), experts_forward(experts, x, chosen, weights)) <= 1e-5


def test_the_host_reads_no_result_of_the_routing():
    """On a GPU it would wait for it. Fake tensors raise if a value is read."""
    from torch._subclasses import FakeTensorMode

    experts = with_adapter(model_of("qwen3-moe"), S2FTConfig(d_ratio=0.3, u_ratio=0.2)).model.layers[0].mlp.experts
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = experts(torch.randn(9, 24), torch.randint(4, (9, 2)), torch.rand(9, 2))
        y.sum().backward()
    assert y.shape == (9, 24)


def test_every_implementation_of_experts_can_be_the_base():
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = model_of("mixtral")
        model.set_experts_implementation(implementation)
        before = output_of(model).detach()
        s2ft.attach(model, S2FTConfig(**ratios_for("mixtral", ALL_RATIOS)))
        assert relative_difference(output_of(model), before) <= 1e-5
        train(model, 1)
        assert relative_difference(output_of(s2ft.detach(model)), before) <= 1e-5


def with_experts_of(kind):
    """A Mixtral whose experts are modules of a class that transformers does not have."""
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = kind
    return model


@pytest.mark.parametrize("case", ("mixtral", "llama", "gpt2"))
def test_blocks_with_a_hook_of_accelerate_train(case):
    plain, model = model_of(case), model_of(case)
    parts = [name for name, _ in model.named_modules() if name.count(".") in (1, 2) or name == "lm_head"]
    devices = {name: "cpu" for name in parts if not name.endswith((".layers", ".h"))}
    dispatch_model(model, devices, main_device="cpu", force_hooks=True)  # as device_map does for several devices
    for one in (plain, model):
        train(randomize(with_adapter(one, S2FTConfig(d_ratio=0.2))), 2)
    assert torch.equal(output_of(model), output_of(plain))
    assert torch.equal(output_of(s2ft.detach(model)), output_of(s2ft.detach(plain)))


def test_ligers_experts_train():
    """Liger-Kernel replaces the class of transformers by this one: no _apply_gate, and SiLU as activation."""

    class LigerExperts(nn.Module):
        forward = FunctionType((lambda self, *args: None).__code__, {"__name__": "liger_kernel.transformers.swiglu"})

    plain = model_of("mixtral")
    expected = output_of(plain).detach()
    model = with_adapter(with_experts_of(LigerExperts), S2FTConfig(d_ratio=0.25))
    assert relative_difference(output_of(model), expected) <= 1e-5
    train(model, 1)
    assert same(s2ft.detach(model), plain)


class Doubled(MixtralExperts):
    def forward(self, *args):
        return 2 * super().forward(*args)


class OtherExperts(nn.Module):
    """Of no library."""


def foreign(kind):
    """A Mixtral whose experts have another forward: one of their own, of their class, put in the class, or unknown."""
    model, plain = model_of("mixtral"), MixtralExperts.forward
    if kind == "own":
        model.model.layers[1].mlp.experts.forward = lambda *args: args[0]
    elif kind == "function":
        MixtralExperts.forward = wraps(plain)(lambda *args: 2 * plain(*args))
    else:
        model = with_experts_of({"class": Doubled, "unknown": OtherExperts}[kind])
    return model


@pytest.mark.parametrize("ffn_kernel", (True, False))
@pytest.mark.parametrize(
    "kind, words",
    [
        ("own", "forward of model.layers.1.mlp.experts has been replaced by .*foreign.*swiglu=False"),
        ("class", "forward of Doubled is a function of test_experts, which can't run"),
        ("function", "forward of MixtralExperts is a function of test_experts, which can't run"),
        ("unknown", "must have _apply_gate.*OtherExperts has none"),
    ],
)
def test_experts_that_would_compute_something_else_are_refused(kind, words, ffn_kernel, monkeypatch):
    """A trainable layer would be read as a parameter, or the forward would be dropped."""
    monkeypatch.setattr(MixtralExperts, "forward", MixtralExperts.forward)  # it is put back
    model, base = foreign(kind), model_of("mixtral").state_dict()
    with pytest.raises(ValueError, match=words):
        s2ft.attach(model, S2FTConfig(d_ratio=0.2, ffn_kernel=ffn_kernel))
    assert s2ft.status(model).adapters == [] and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("hook", (True, False))
def test_a_hook_on_the_activation_of_experts_or_another_one_runs(hook):
    model, plain = with_adapter(model_of("mixtral"), S2FTConfig(d_ratio=0.2)), model_of("mixtral")
    for experts in (one.model.layers[0].mlp.experts for one in (model, plain)):
        if hook:
            experts.act_fn.register_forward_hook(doubled)
        else:
            experts.act_fn = nn.Tanh()
    assert relative_difference(output_of(model), output_of(plain)) <= 1e-5


LAYOUTS = {
    "biases stay": {"bias": None},
    "gate and up in two halves": {"interleaved": False},
    "not transposed": {"transposed": False},
}


@pytest.mark.parametrize("wrong", LAYOUTS)
def test_a_wrong_layout_of_experts_is_found(wrong):
    """The experts of GPT-OSS are transposed, with gate and up in turn, and with biases."""
    model = alias_of("gpt_oss", hidden_size=32, intermediate_size=16, num_local_experts=2)
    block = "model.layers.0.mlp.experts"
    right = dict(
        gate_up=f"{block}.gate_up_proj",
        down=f"{block}.down_proj",
        channels=16,
        experts=2,
        transposed=True,
        interleaved=True,
        bias=f"{block}.gate_up_proj_bias",
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="attach would change what the model computes|expected a weight with"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.2), couplings=Coupling.experts(0, **{**right, **LAYOUTS[wrong]}))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    s2ft.attach(model, S2FTConfig(d_ratio=0.2), couplings=Coupling.experts(0, **right))


@pytest.mark.parametrize("model_type", ("gpt_oss", "llama4_text", "nemotron_h"))
def test_merged_experts_of_every_layout_load_in_transformers(model_type, tmp_path):
    model = alias_of(model_type)
    fit(with_adapter(model, S2FTConfig(d_ratio=0.2, u_ratio=0.2, o_ratio=0.5)), 1)
    merged = s2ft.merge(copy.deepcopy(model))
    merged.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, merged.state_dict()[key]) for key, value in again.state_dict().items())
    assert torch.equal(output_of(again), output_of(merged))
    assert relative_difference(output_of(again), output_of(model)) <= 1e-5
