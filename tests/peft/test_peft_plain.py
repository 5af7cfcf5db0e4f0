"""S²FT in PEFT on modules outside any family: linear layers, Conv1D, convolutions, quantized and hooked layers."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from support.models import model_of, output_of, token_batch
from support.tolerances import GEMM
from torch import nn
from transformers.pytorch_utils import Conv1D

import s2ft
from s2ft.peft import S2FTPeftConfig, S2FTPeftLayer, from_native, to_native

MODULES = {  # a module and an input
    "linear": lambda: (nn.Linear(9, 11), torch.randn(4, 3, 9)),
    "linear-unbiased": lambda: (nn.Linear(9, 11, bias=False), torch.randn(4, 9)),
    "Conv1D": lambda: (Conv1D(11, 9), torch.randn(4, 3, 9)),
    "conv1d-same": lambda: (nn.Conv1d(6, 8, 3, padding="same", dilation=2), torch.randn(4, 6, 12)),
    "conv2d-reflect": lambda: (
        nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"),
        torch.randn(4, 6, 7, 7),
    ),
    "conv3d": lambda: (nn.Conv3d(6, 8, 2, padding=1), torch.randn(4, 6, 4, 4, 4)),
}
modules = pytest.mark.parametrize("kind", MODULES)
dims = pytest.mark.parametrize("dim", ("inputs", "outputs"))


def wrapped(kind, dim, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    module, x = MODULES[kind]()
    net = nn.Sequential(module, nn.Tanh()).to(dtype)
    plain = copy.deepcopy(module)
    config = S2FTPeftConfig(**{"target_modules": ["0"], "ratio": 0.4, "dim": dim, "init_weights": False, **fields})
    return get_peft_model(net, config, "a").eval(), x.to(dtype), plain


def layer_of(model):
    return next(module for module in model.modules() if isinstance(module, S2FTPeftLayer))


def dense_of(model, names):
    """The plain module plus the dense deltas of the adapters, in double precision."""
    layer = layer_of(model)
    dense = copy.deepcopy(layer.base_layer).double()
    with torch.no_grad():
        for name in names:
            dense.weight += layer.get_delta_weight(name).double()
    return dense


@modules
@dims
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_forward_and_merging(kind, dim, dtype):
    model, x, _ = wrapped(kind, dim, dtype)
    model.add_adapter("b", S2FTPeftConfig(target_modules=["0"], ratio=0.4, dim=dim, init_weights=False, seed=1))
    for active in (["a"], ["b"], ["a", "b"]):
        model.base_model.set_adapter(active)
        y, before = model(x), layer_of(model).base_layer.weight.clone()
        rtol, atol = GEMM[dtype]
        assert torch.allclose(y.double(), dense_of(model, active)(x.double()).tanh(), rtol=10 * rtol, atol=10 * atol)
        model.merge_adapter(safe_merge=True)
        assert torch.equal(model(x), y)
        model.unmerge_adapter()
        assert torch.equal(layer_of(model).base_layer.weight, before)


@modules
@dims
def test_gradients(kind, dim):
    model, x, _ = wrapped(kind, dim)
    x.requires_grad_()
    model(x).square().sum().backward()
    layer, dense, x64 = layer_of(model), dense_of(model, ["a"]), x.detach().double().requires_grad_()
    dense.weight.requires_grad_()
    dense(x64).tanh().square().sum().backward()
    expected = dense.weight.grad.t() if isinstance(dense, Conv1D) else dense.weight.grad
    expected = expected.flatten(2) if expected.dim() > 2 else expected
    expected = expected.index_select(layer.dim, layer.s2ft_delta["a"].index)
    assert torch.allclose(layer.s2ft_delta["a"].values.grad.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    assert layer.base_layer.weight.grad is None


@modules
@dims
@pytest.mark.parametrize("grad", (False, True))
def test_mixed_batches(kind, dim, grad):
    model, x, plain = wrapped(kind, dim)
    model.add_adapter("b", S2FTPeftConfig(target_modules=["0"], ratio=0.7, dim=dim, init_weights=False, seed=1))
    model.requires_grad_(True)
    names = ["b", "__base__", "a", "b"]
    with torch.set_grad_enabled(grad):
        y = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        expected = plain(x[row : row + 1]).tanh() if name == "__base__" else model(x[row : row + 1])
        assert torch.allclose(y[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    if grad:
        model.requires_grad_(True)
        model(x, adapter_names=names).sum().backward()
        assert all(layer_of(model).s2ft_delta[name].values.grad.abs().sum() > 0 for name in "ab")


@modules
@dims
def test_saving_and_loading(kind, dim, tmp_path):
    model, x, plain = wrapped(kind, dim)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(nn.Sequential(plain, nn.Tanh()), str(tmp_path / "a"), adapter_name="other").eval()
    assert torch.equal(again(x), model(x)) and again.peft_config["other"].dim == dim


def test_a_layer_gets_all_tokens_in_one_dimension():
    """The FFN of OPT gets the tokens of all sequences in one dimension."""
    model, _, plain = wrapped("linear", "outputs")
    x, layer = torch.randn(6, 9), layer_of(model)
    y = layer(x, adapter_names=["a", "__base__"])
    assert torch.allclose(y[:3], layer(x[:3])) and torch.allclose(y[3:], plain(x[3:]))
    with pytest.raises(ValueError, match="got 4 and 6"):
        layer(x, adapter_names=["a"] * 4)


def test_one_side_of_a_module():
    """An adapter on the other side is refused, and no module of it is changed."""
    net = nn.Sequential(nn.Linear(9, 11), nn.Linear(11, 9))
    model = get_peft_model(net, S2FTPeftConfig(target_modules=["1"], ratio=0.4, dim="inputs"), "a")
    with pytest.raises(ValueError, match="'b' trains outputs of a module, and another adapter trains its inputs"):
        model.add_adapter("b", S2FTPeftConfig(target_modules=["0", "1"], ratio=0.4, dim="outputs"))
    assert set(model.peft_config) == {"a"} and list(layer_of(model).s2ft_delta) == ["a"]
    assert type(net[0]) is nn.Linear


def test_selection_by_weight_takes_the_largest_units():
    model, _, plain = wrapped("linear", "inputs", ratio=0.3, selection="weight")
    assert model.peft_config["a"].units["0"] == sorted(plain.weight.norm(dim=0).topk(3).indices.tolist())


@pytest.mark.parametrize(
    "module, name",
    (
        (nn.Conv2d(6, 8, 3, groups=2), "Conv2d of 2 groups"),
        (nn.Embedding(5, 6), "Embedding"),
        (nn.MultiheadAttention(8, 2), "MultiheadAttention"),
        (nn.ReLU(), "ReLU"),
    ),
)
def test_modules_that_are_refused(module, name):
    with pytest.raises(ValueError, match=f"0 is a {name}: S²FT trains"):
        get_peft_model(nn.Sequential(module), S2FTPeftConfig(target_modules=["0"], ratio=0.5, dim="inputs"))


def test_loading_does_not_change_requires_grad(tmp_path):
    model, *_ = wrapped("linear", "inputs")
    model.save_pretrained(tmp_path)
    layer = layer_of(model)
    layer.base_layer.weight.requires_grad, layer.s2ft_delta["a"].values.requires_grad = True, False
    model.load_adapter(str(tmp_path / "a"), "b")
    assert layer.base_layer.weight.requires_grad
    assert not layer.s2ft_delta["a"].values.requires_grad and not layer.s2ft_delta["b"].values.requires_grad


def test_deleting_the_last_adapter_leaves_the_base():
    model, x, plain = wrapped("linear", "inputs")
    model.delete_adapter("a")
    assert torch.equal(model.base_model.model(x), plain(x).tanh()) and not layer_of(model).s2ft_delta


# ---- accelerate's hooks ---------------------------------------------------------------------------------


def test_weights_that_accelerate_offloads():
    """An offloaded weight is on the meta device, except during the forward of its module."""
    model, x, _ = wrapped("linear", "outputs")
    expected, layer = model(x), layer_of(model)
    weights = {name: value.clone() for name, value in layer.base_layer.state_dict().items()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(layer.base_layer, hook)
    assert layer.base_layer.weight.is_meta
    with torch.no_grad():
        assert torch.equal(model(x), expected) and layer.base_layer.weight.is_meta
        with model.disable_adapter():
            assert torch.equal(model(x), nn.functional.linear(x, weights["weight"], weights["bias"]).tanh())


def test_a_model_on_the_meta_device_chooses_the_same_units():
    meta, here = (
        get_peft_model(model, S2FTPeftConfig(d_ratio=0.1, seed=4))
        for model in (model_of("llama-grouped").to("meta"), model_of("llama-grouped"))
    )
    assert meta.peft_config["default"].units == here.peft_config["default"].units
    delta = layer_of(meta).s2ft_delta["default"]
    assert delta.values.is_meta and not delta.index.is_meta
    assert meta.peft_config["default"].base_fingerprint is None


# ---- quantized bases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("nf4", "8bit", "torchao-int8"))
def test_quantized_bases(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    from test_quantized import dense_reference, quantized

    from s2ft.layers import NO_FUSE

    base = quantized(kind)
    tokens, reference = token_batch(base), output_of(quantized(kind))
    model = get_peft_model(
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False),
        S2FTPeftConfig(o_ratio=0.5, u_ratio=0.2, d_ratio=0.2),
    ).eval()
    assert torch.allclose(model(tokens).logits, reference, rtol=1e-3, atol=1e-3)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    trained = model(tokens).logits
    with pytest.raises(ValueError, match=NO_FUSE[:40]):
        model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(tokens).logits, model.get_base_model()(tokens).logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(kind), tmp_path).eval()
    assert torch.allclose(again(tokens).logits, trained, rtol=1e-3, atol=1e-3)
    dense = PeftModel.from_pretrained(dense_reference(quantized(kind)), tmp_path).eval()  # same fingerprint
    assert torch.allclose(dense(tokens).logits, trained, rtol=0.05, atol=0.05)
    dense.merge_and_unload()


def test_quantized_weights_that_pass_no_gradient_are_refused_for_training():
    pytest.importorskip("bitsandbytes")
    torchao = pytest.importorskip("torchao.quantization")
    from test_quantized import plain

    model = plain()
    torchao.quantize_(
        model,
        torchao.Int8DynamicActivationInt8WeightConfig(),
        lambda module, path: path.endswith("layers.1.self_attn.o_proj"),
    )
    with pytest.raises(ValueError, match="layers.1.self_attn.o_proj .* passes no gradient"):
        get_peft_model(model, S2FTPeftConfig(d_ratio=0.1))
    get_peft_model(model, S2FTPeftConfig(d_ratio=0.1, inference_mode=True))


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_couplings_of_a_model_of_no_known_family_are_saved_with_the_adapter(tmp_path, monkeypatch):
    coupling, x = s2ft.Coupling.ffn(0, up="0", down="2", channels=8), torch.randn(3, 4)
    for given in (True, False):
        if not given:  # as a search for couplings would find them
            monkeypatch.setattr("s2ft.peft.units.couplings_of", lambda model: [coupling])
        couplings = [coupling] if given else None
        model = get_peft_model(two_layers(), S2FTPeftConfig(u_ratio=0.5, d_ratio=0.5, couplings=couplings))
        monkeypatch.undo()
        with torch.no_grad():
            for layer in (module for module in model.modules() if isinstance(module, S2FTPeftLayer)):
                layer.s2ft_delta["default"].values.normal_()
        folder = tmp_path / str(given)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(two_layers(), folder)
        assert set(again.peft_config["default"].units) == {"0", "2"} and torch.equal(again(x), model(x))
        native, adapter = two_layers(), to_native(model)
        s2ft.load_adapter(native, adapter)
        torch.testing.assert_close(native(x), model(x))
        torch.testing.assert_close(from_native(two_layers(), adapter)(x), model(x))


def test_wrong_couplings_are_refused():
    with pytest.raises(ValueError, match="expected a weight with 9"):
        wrong = s2ft.Coupling.ffn(0, up="0", down="2", channels=9)
        get_peft_model(two_layers(), S2FTPeftConfig(d_ratio=0.5, couplings=[wrong]))
    with pytest.raises(TypeError, match="couplings"):
        S2FTPeftConfig(d_ratio=0.5, couplings=["0"])
