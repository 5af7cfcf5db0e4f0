"""S²FT in PEFT on modules outside any family: linear layers, Conv1D, convolutions, quantized and hooked layers."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from support.models import model_of
from support.nets import seeded
from support.peft_modules import MODULES, net_of
from support.states import with_loaded
from support.tolerances import GEMM
from torch import nn
from transformers.pytorch_utils import Conv1D

import s2ft
from s2ft.peft import S2FTPeftConfig, S2FTPeftLayer, from_native, to_native

modules = pytest.mark.parametrize("kind", MODULES)
dims = pytest.mark.parametrize("dim", ("inputs", "outputs"))


def wrapped(kind, dim, dtype=torch.float32, **fields):
    net, x = net_of(kind, dtype), MODULES[kind]()[1]
    plain = copy.deepcopy(net[0])
    config = S2FTPeftConfig(**{"target_modules": ["0"], "ratio": 0.4, "dim": dim, "init_weights": False, **fields})
    return get_peft_model(net, config, "a").eval(), x.to(dtype), plain


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, S2FTPeftLayer))


def dense_of(model, names):
    """The plain module plus the dense deltas of the adapters, in double precision."""
    layer = layer_of(model)
    dense = copy.deepcopy(layer.get_base_layer()).double()
    for name in names:
        dense.weight.data += layer.get_delta_weight(name).detach().double()
    return dense.requires_grad_()


@modules
@dims
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_forward_and_gradients(kind, dim, dtype):
    """Of each adapter alone and of two at a time, as of the dense weight."""
    model, x, _ = wrapped(kind, dim, dtype)
    model.add_adapter("b", S2FTPeftConfig(target_modules=["0"], ratio=0.4, dim=dim, init_weights=False, seed=1))
    layer, (rtol, atol) = layer_of(model), GEMM[dtype]
    for active in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(active)
        model.zero_grad()
        given, dense = x.clone().requires_grad_(), dense_of(model, active)
        y, wide = model(given), x.double().requires_grad_()
        expected = dense(wide).tanh()
        torch.testing.assert_close(y.double(), expected, rtol=10 * rtol, atol=10 * atol)
        if dtype is torch.float32:
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(given.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
            gradient = dense.weight.grad.t() if isinstance(dense, Conv1D) else dense.weight.grad
            gradient = gradient.flatten(2) if gradient.dim() > 2 else gradient
            for name in active:
                delta = layer.s2ft_delta[name]
                expected_part = gradient.index_select(layer.dim, delta.index)
                torch.testing.assert_close(delta.values.grad.double(), expected_part, rtol=1e-4, atol=1e-4)
            assert layer.base_layer.weight.grad is None


@modules
@dims
def test_another_adapter_runs_between_forward_and_backward(kind, dim):
    """As in DPO, whose reference is another adapter. It is written into the weight of which the backward needs."""
    model, x, _ = wrapped(kind, dim)
    model.add_adapter("b", S2FTPeftConfig(target_modules=["0"], ratio=0.4, dim=dim, init_weights=False, seed=1))
    gradients = []
    for others in ([], ["b"]):
        given = x.clone().requires_grad_()
        model.base_model.set_adapter("a")
        loss = model(given).square().sum()
        for name in others:
            model.base_model.set_adapter(name)
            model(x)
        loss.backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_torch_func_after_a_forward():
    model, x, _ = wrapped("linear", "inputs")
    values = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(given):
        return torch.func.functional_call(model, given, (x,)).square().sum()

    loss(values).backward()
    found = torch.func.grad(loss)({name: value.detach() for name, value in values.items()})
    for name, value in values.items():
        torch.testing.assert_close(found[name], value.grad)


def test_values_that_are_written_by_hand_are_used():
    """As averaged weights are put in for an evaluation. No version counts such a change."""
    model, x, _ = wrapped("linear", "inputs")
    delta, before = layer_of(model).s2ft_delta["a"].values, model(x)
    kept = delta.data.clone()
    delta.data.mul_(2)
    assert not torch.equal(model(x), before)
    delta.data.copy_(kept)
    assert torch.equal(model(x), before)


def test_one_side_of_a_module():
    """An adapter on the other side is refused, and no module of it is changed."""
    net = nn.Sequential(nn.Linear(9, 11), nn.Linear(11, 9))
    model = get_peft_model(net, S2FTPeftConfig(target_modules=["1"], ratio=0.4, dim="inputs"), "a")
    with pytest.raises(ValueError, match="'b' trains outputs of a module, and another adapter trains its inputs"):
        model.add_adapter("b", S2FTPeftConfig(target_modules=["0", "1"], ratio=0.4, dim="outputs"))
    assert set(model.peft_config) == {"a"} and list(layer_of(model).s2ft_delta) == ["a"] and type(net[0]) is nn.Linear
    model.add_adapter("c", S2FTPeftConfig(target_modules=["0"], ratio=0.4, dim="inputs"))
    model.delete_adapter("a")
    model.add_adapter("d", S2FTPeftConfig(target_modules=["1"], ratio=0.4, dim="outputs"))  # "a" is gone


# ---- accelerate's hooks ---------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_that_accelerate_offloads():
    """An offloaded weight is on the meta device, except during the forward of its module."""
    model, x, _ = wrapped("linear", "outputs")
    expected, layer = model(x), layer_of(model)
    weights = {name: value.clone() for name, value in layer.get_base_layer().state_dict().items()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(layer.base_layer, hook)
    assert layer.base_layer.weight.is_meta and torch.equal(model(x), expected) and layer.base_layer.weight.is_meta
    with model.disable_adapter():
        assert torch.equal(model(x), nn.functional.linear(x, weights["weight"], weights["bias"]).tanh())


class Masked(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


def test_further_arguments_reach_a_layer_with_a_hook():
    config = S2FTPeftConfig(target_modules=["0"], ratio=0.5, dim="outputs", init_weights=False)
    layer = layer_of(get_peft_model(nn.Sequential(Masked(4, 4)), config))
    x, mask = torch.randn(3, 4), torch.tensor([1.0, 0, 1, 2])
    expected = layer(x, mask=mask)
    add_hook_to_module(layer.base_layer, AlignDevicesHook("cpu"))
    torch.testing.assert_close(layer(x, mask=mask), expected)


def test_two_adapters_in_inference_mode():
    model, x, _ = wrapped("linear", "outputs")
    model.add_adapter("b", S2FTPeftConfig(target_modules=["0"], ratio=0.4, dim="outputs", init_weights=False))
    model.base_model.set_adapter(["a", "b"])
    with torch.inference_mode():
        found = model(x)
    assert torch.equal(model(x), found)
    model(x).sum().backward()


def test_a_model_on_the_meta_device_chooses_the_same_units():
    meta, here = (
        get_peft_model(model, S2FTPeftConfig(d_ratio=0.1, seed=4))
        for model in (model_of("llama-grouped").to("meta"), model_of("llama-grouped"))
    )
    assert meta.peft_config["default"].units == here.peft_config["default"].units
    delta = layer_of(meta).s2ft_delta["default"]
    assert delta.values.is_meta and not delta.index.is_meta and meta.peft_config["default"].base_fingerprint is None


# ---- quantized bases ------------------------------------------------------------------------------------


def test_an_adapter_of_a_quantized_base_loads_on_the_dequantized_one(tmp_path):
    from support.quantized import dense_reference, forward, quantized

    model = get_peft_model(quantized("nf4"), S2FTPeftConfig(d_ratio=0.2, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    dense = PeftModel.from_pretrained(dense_reference(quantized("nf4")), tmp_path)  # same fingerprint
    torch.testing.assert_close(forward(dense), forward(model), rtol=1e-3, atol=1e-3)


def test_quantized_weights_that_pass_no_gradient_are_refused_for_training():
    from support.quantized import dynamic

    model = dynamic("Int8DynamicActivationInt8WeightConfig")
    with pytest.raises(ValueError, match="layers.1.self_attn.o_proj .* passes no gradient"):
        get_peft_model(model, S2FTPeftConfig(d_ratio=0.1))
    get_peft_model(model, S2FTPeftConfig(d_ratio=0.1, inference_mode=True))


def two_layers():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def test_couplings_of_a_model_of_no_known_family_are_saved_with_the_adapter(tmp_path, monkeypatch):
    coupling, x = s2ft.Coupling.ffn(0, up="0", down="2", channels=8), torch.randn(3, 4)
    for given in (True, False):
        if not given:  # as a search for couplings would find them
            monkeypatch.setattr("s2ft.peft.native_adapter.couplings_of", lambda model: [coupling])
        couplings = [coupling] if given else None
        model = get_peft_model(two_layers(), S2FTPeftConfig(u_ratio=0.5, d_ratio=0.5, couplings=couplings))
        monkeypatch.undo()
        for layer in (module for module in model.modules() if isinstance(module, S2FTPeftLayer)):
            layer.s2ft_delta["default"].values.data.normal_()
        folder = tmp_path / str(given)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(two_layers(), folder)
        assert set(again.peft_config["default"].units) == {"0", "2"} and torch.equal(again(x), model(x))
        adapter = to_native(model)
        torch.testing.assert_close(with_loaded(two_layers(), adapter)(x), model(x))
        torch.testing.assert_close(from_native(two_layers(), adapter)(x), model(x))
