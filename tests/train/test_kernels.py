"""Kernels of Liger-Kernel around an attached model.

The package needs a GPU and Triton, so these tests run on a stand-in that replaces what Liger-Kernel replaces: a function
and a class of transformers' module, and the forwards of the model's norms. tests/gpu runs the real kernels.
"""

import importlib.util
import sys
from types import MethodType, ModuleType, SimpleNamespace

import pytest
import torch
from support.inside import MissingPackages, RunOptions, apply_kernels, check_kernels, train_loading
from support.models import model_of
from support.states import same, with_adapter
from support.tolerances import relative_difference
from torch import nn
from train.test_loss import gradients
from train.tiny import tiny_model
from transformers.models.llama import modeling_llama

import s2ft

BATCH = dict.fromkeys(("input_ids", "labels"), torch.arange(16).view(2, 8) + 5)


class FasterNorm(nn.Module):
    calls = 0

    def forward(self, hidden_states):
        FasterNorm.calls += 1
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * scale)


@pytest.fixture
def liger(monkeypatch):
    """A package with the structure of Liger-Kernel. Its `options` are those of the last call."""
    original, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    package, seen = ModuleType("liger_kernel.transformers"), SimpleNamespace(options=None, rotated=0)

    def rotate(*args, **options):
        seen.rotated += 1
        return original(*args, **options)

    def apply(model, **options):
        seen.options = options
        modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm = rotate, FasterNorm
        for module in model.modules():
            if isinstance(module, norm):
                module.forward = MethodType(FasterNorm.forward, module)

    package._apply_liger_kernel_to_instance = apply
    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply, "mixtral": apply}
    for module in (ModuleType("liger_kernel"), package, patches):
        module.__spec__ = importlib.util.spec_from_loader(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    yield seen
    modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm = original, norm


@pytest.mark.parametrize("attach_first", (False, True))
def test_an_attached_model_trains_on_the_other_kernels(liger, attach_first):
    config = s2ft.S2FTConfig(d_ratio=0.2, u_ratio=0.1, q_ratio=0.5)
    plain, model, base = with_adapter(tiny_model(), config), tiny_model(), tiny_model()
    steps = [lambda: s2ft.attach(model, config), lambda: apply_kernels(model, "liger")]
    for step in steps if attach_first else reversed(steps):
        step()
    (expected, theirs), called = gradients(plain, BATCH), FasterNorm.calls
    found, ours = gradients(model, BATCH)
    assert FasterNorm.calls > called and liger.rotated  # the model really runs on them
    assert relative_difference(found, expected) <= 1e-6
    assert ours.keys() == theirs.keys() and all(
        relative_difference(gradient, theirs[name]) <= 1e-4 for name, gradient in ours.items()
    )
    assert same(s2ft.detach(model), base)


def test_ffn_and_loss_stay_those_of_s2ft(liger):
    model = tiny_model()
    apply_kernels(model, "liger")
    assert liger.options == dict.fromkeys(train_loading.LEFT_TO_S2FT, False)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.2))
    assert model.model.layers[0].mlp.forward.func.__name__ == "gated_forward"


def test_kernels_that_can_not_run_are_refused(liger, monkeypatch):
    with pytest.raises(ValueError, match="kernels must be one of s2ft, liger, got 'ligger'"):
        RunOptions(kernels="ligger")
    with pytest.raises(ValueError, match="has none for models of type 'phi', only for llama, mixtral"):
        apply_kernels(model_of("phi"), "liger")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="need a GPU.*leave out --kernels liger"):
        check_kernels("liger")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(MissingPackages, match="pip install liger-kernel"):
        check_kernels("liger")
