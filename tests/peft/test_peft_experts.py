"""Stacked experts in PEFT, named by target_parameters or by ratios: the same units and numbers as with attach."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import loss_of, model_of, output_of, token_batch, train
from support.tolerances import LOGITS, relative_difference
from torch import nn

import s2ft
from s2ft.peft import S2FTPeftConfig, from_native, to_native
from s2ft.peft.experts import S2FTPeftExperts

CASES = ("mixtral", "qwen3-moe")
BOTH = dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ratio=0.2)


def peft_of(case, name="default", seed=0, **config):
    config = config or BOTH
    settings = S2FTPeftConfig(**config, seed=seed, init_weights=False)
    return get_peft_model(model_of(case), settings, name, autocast_adapter_dtype=False).eval()


def experts_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTPeftExperts)}


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("case", CASES)
def test_experts_are_trained_as_by_attach(case):
    options = dict(u_ratio=0.2, g_ratio=0.2, d_ratio=0.2)
    by_ratio, by_name = (get_peft_model(model_of(case), S2FTPeftConfig(**some)) for some in (options, BOTH))
    native = model_of(case)
    s2ft.attach(native, s2ft.S2FTConfig(**options, layout="indexed", ffn_kernel=False))
    chosen = s2ft.select(model_of(case), s2ft.S2FTConfig(**options)).to_dict()
    assert by_ratio.peft_config["default"].units == chosen
    assert by_name.peft_config["default"].units == {key: units for key, units in chosen.items() if "[" in key}
    for model in (by_ratio, native):
        train(model, steps=3)
    adapter, ours = s2ft.get_adapter(native, "default"), to_native(by_ratio)
    assert adapter.deltas.keys() == ours.deltas.keys()
    for key, delta in adapter.deltas.items():
        torch.testing.assert_close(ours.deltas[key].values, delta.values, rtol=1e-3, atol=1e-6)
        assert torch.equal(ours.deltas[key].index, delta.index)


@pytest.mark.parametrize("case", CASES)
def test_experts_are_merged_unmerged_saved_and_loaded(case, tmp_path):
    base, model = model_of(case), peft_of(case)
    assert len(experts_of(model)) > 1 and model.peft_config["default"].target_modules is None
    output = output_of(model)
    assert relative_difference(output, output_of(base)) > 1e-3
    with model.disable_adapter():
        assert torch.equal(output_of(model), output_of(base))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output_of(again), output)
    model.merge_adapter(safe_merge=True)
    assert relative_difference(output_of(model), output) <= LOGITS
    model.unmerge_adapter()
    assert torch.equal(output_of(model), output) and same_state(copy.deepcopy(model).unload(), base)
    model.merge_adapter()
    assert same_state(copy.deepcopy(model).unload(), base)
    merged = model.merge_and_unload()
    assert same_state(merged, again.merge_and_unload()) and not same_state(merged, base)
    assert relative_difference(output_of(merged), output) <= LOGITS


def test_every_delta_of_an_expert_with_tokens_gets_a_gradient():
    model = peft_of("mixtral").train()
    loss_of(model).backward()
    for layer in experts_of(model).values():
        for delta in layer.s2ft_delta["default"].values():
            assert delta.values.grad.abs().max() > 0
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".s2ft_delta.default." in name for name in trainable)


def test_several_adapters_add_up_switch_and_mix():
    model, case = peft_of("mixtral", "a"), "mixtral"
    model.add_adapter("b", S2FTPeftConfig(target_parameters=["down_proj"], ratio=0.3, seed=3, init_weights=False))
    outputs = {"a": output_of(model)}
    model.set_adapter("b")
    outputs["b"] = output_of(model)
    model.base_model.set_adapter(["a", "b"])
    both = output_of(model)
    for layer in experts_of(model).values():
        delta = layer.sum_of("down_proj", ["a", "b"])
        assert torch.equal(delta.index, delta.index.sort().values)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    assert relative_difference(output_of(model), both) <= LOGITS
    tokens = token_batch(model, batch=3)
    with torch.no_grad():
        mixed = model(tokens, adapter_names=["b", "__base__", "a"]).logits
        for i, name in enumerate(("b", None, "a")):
            if name is None:
                expected = model_of(case)(tokens).logits
            else:
                model.set_adapter(name)
                expected = model(tokens).logits
            assert relative_difference(mixed[i], expected[i]) <= LOGITS
    model.delete_adapter("a")
    model.set_adapter("b")
    assert relative_difference(output_of(model), outputs["b"]) <= LOGITS
    assert same_state(model.unload(), model_of(case))


def test_adapters_of_experts_convert_to_native_and_back():
    model = peft_of("qwen3-moe")
    output, adapter = output_of(model), to_native(model)
    native = model_of("qwen3-moe")
    s2ft.load_adapter(native, adapter)
    assert relative_difference(output_of(native), output) <= LOGITS
    again = from_native(model_of("qwen3-moe"), adapter).eval()
    assert torch.equal(output_of(again), output)
    assert same_state(s2ft.merge(native), again.merge_and_unload())


def test_experts_of_no_known_family(monkeypatch):
    base = model_of("mixtral")
    monkeypatch.setattr("s2ft.peft.units.known_architectures", list)
    for dim in (None, "outputs"):
        model = peft_of("mixtral", target_parameters=["experts.down_proj"], ratio=0.25, dim=dim)
        (layer, *_) = experts_of(model).values()
        assert layer.dims == {"down_proj": 0 if dim else 1}
        output = output_of(model)
        assert relative_difference(output_of(model.merge_and_unload()), output) <= LOGITS
        assert relative_difference(output, output_of(base)) > 1e-3


def test_a_ratio_for_modules_does_not_touch_experts():
    model = peft_of("qwen3-moe", target_modules=["o_proj"], ratio=0.5)
    assert not experts_of(model)
    model = peft_of("qwen3-moe", target_modules=["o_proj"], target_parameters=["experts.down_proj"], ratio=0.5)
    assert experts_of(model) and any("o_proj" in name for name in model.peft_config["default"].units)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack, self.linear = nn.Parameter(torch.randn(2, 4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x @ self.stack[0])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Unknown()

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(target_parameters=["block.stack"], ratio=0.5), "Unknown has none"),
        (dict(target_parameters=["linear.weight"], ratio=0.5), "2 dimensions, .* name the module .* target_modules"),
        (dict(target_parameters=["nowhere"], ratio=0.5), "no .target_parameters. found"),
        (dict(target_parameters="block.stack", ratio=0.5), "target_parameters must be a list"),
        (dict(target_parameters=["block.stack"]), "needs ratio"),
        (dict(target_parameters=["block.stack"], d_ratio=0.5), "exclude each other"),
    ],
)
def test_bad_parameters_are_refused_and_the_model_stays(config, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        get_peft_model(net, S2FTPeftConfig(**config))
    assert not any("S2FT" in type(module).__name__ for module in net.modules())
