"""Adapters live on the devices of the model's weights, and a switch neither waits for a device nor sends to it.

There is no GPU here: the model has tensors without data that say that they are on one (FakeTensorMode). Reading a value
of such a tensor is an error, and copies between devices are counted.
"""

import copy

import pytest
import torch
from state.models import make_adapter, ratios, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s2ft

GPU = torch.device("cuda", 0)


class Copies(TorchDispatchMode):
    """Counts operations that send tensors from one device to another, for which PyTorch waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if len({leaf.device for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}) > 1:
            self.seen.append(str(function))
        return result


def loaded(layout: str | None = None, device: str | None = None) -> torch.nn.Module:
    """A model with two loaded adapters; with a layout also a trainable one."""
    model = tiny_model("llama", layers=2)
    made = [make_adapter(model, s2ft.S2FTConfig(**ratios("llama"), seed=i), name, i) for i, name in enumerate("ab")]
    if layout is not None:
        s2ft.attach(model, s2ft.S2FTConfig(**ratios("llama"), layout=layout), name="t")
    for adapter in made:
        s2ft.load_adapter(model, adapter, active=False, device=device)
    return model


def on_gpu(model: torch.nn.Module) -> FakeTensorMode:
    """Replace the weights of a model by ones without data that are on a GPU, as model.to would."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=GPU)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return mode


@pytest.mark.parametrize("layout", (None, "permuted", "indexed"))
def test_a_switch_waits_for_nothing(layout):
    model = loaded(layout)
    with on_gpu(model):
        for adapter in "ab":
            s2ft.set_adapter(model, adapter)  # the first one after the move sends the adapter
        with Copies() as copies:
            for active in ("a", "b", {"a": 0.5, "b": -2.0}, None, "a"):
                s2ft.set_adapter(model, active)
    assert copies.seen == []


def test_an_adapter_with_a_device_of_its_own_stays_there():
    model = loaded(device="cpu")
    s2ft.load_adapter(model, s2ft.get_adapter(model, "a"), "c", active=False)
    assert s2ft.get_adapter(model, "c").device is None
    with on_gpu(model):
        for adapter in "ab":
            s2ft.set_adapter(model, adapter)
        with Copies() as copies:
            s2ft.set_adapter(model, "a")  # from b to a
        deltas = s2ft.get_adapter(model, "a").deltas
        assert {delta.values.device for delta in deltas.values()} == {torch.device("cpu")}
        assert len(copies.seen) == len(deltas)


def test_adapters_follow_the_model():
    model = loaded()
    with on_gpu(model):
        s2ft.set_adapter(model, "a")
        assert {delta.values.device for delta in s2ft.get_adapter(model, "a").deltas.values()} == {GPU}
        assert {delta.index.device.type for delta in s2ft.get_adapter(model, "a").deltas.values()} == {"cpu"}


def test_one_adapter_can_be_loaded_into_two_models():
    """The positions that a delta keeps are those of the model that used it last."""
    plain = tiny_model("llama")
    adapter = make_adapter(plain, s2ft.S2FTConfig(**ratios("llama")), "a", 0)
    models = [copy.deepcopy(plain) for _ in range(2)]
    s2ft.attach(models[0], s2ft.S2FTConfig(**ratios("llama"), seed=5), name="t")  # moves units
    for model in models:
        s2ft.load_adapter(model, adapter)
    for _ in range(2):
        for model in models:
            s2ft.set_adapter(model, None)
            s2ft.set_adapter(model, "a")
    merged = [s2ft.merge(model).state_dict() for model in models]
    assert all(torch.equal(value, merged[1][name]) for name, value in merged[0].items())
