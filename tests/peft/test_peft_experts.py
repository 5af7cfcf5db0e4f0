"""Stacked experts in PEFT, named by target_parameters or by ratios: the same units and numbers as with attach."""

import pytest
import torch
from peft import get_peft_model
from support.inside import S2FTPeftExperts
from support.models import model_of, output_of, train
from support.peft_modules import injected
from support.states import with_adapter
from support.tolerances import LOGITS, relative_difference

import s2ft
from s2ft.peft import S2FTPeftConfig, to_native

CASES = ("mixtral", "qwen3-moe")
BOTH = dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ratio=0.2)


def experts_of(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, S2FTPeftExperts)}


@pytest.mark.parametrize("case", CASES)
def test_experts_are_trained_as_by_attach(case):
    options = dict(u_ratio=0.2, g_ratio=0.2, d_ratio=0.2)
    by_ratio, by_name = (get_peft_model(model_of(case), S2FTPeftConfig(**some)) for some in (options, BOTH))
    native = with_adapter(model_of(case), s2ft.S2FTConfig(**options, layout="indexed", ffn_kernel=False))
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


def test_experts_of_no_known_family(monkeypatch):
    base = model_of("mixtral")
    monkeypatch.setattr("s2ft.peft.native_adapter.is_known", lambda model: False)
    for dim in (None, "outputs"):
        model = injected(model_of("mixtral"), target_parameters=["experts.down_proj"], ratio=0.25, dim=dim)
        (layer, *_) = experts_of(model).values()
        assert layer.dims == {"down_proj": 0 if dim else 1}
        output = output_of(model)
        assert relative_difference(output_of(model.merge_and_unload()), output) <= LOGITS
        assert relative_difference(output, output_of(base)) > 1e-3


def test_a_ratio_for_modules_does_not_touch_experts():
    model = injected(model_of("qwen3-moe"), target_modules=["o_proj"], ratio=0.5)
    assert not experts_of(model)
    model = injected(
        model_of("qwen3-moe"), target_modules=["o_proj"], target_parameters=["experts.down_proj"], ratio=0.5
    )
    assert experts_of(model) and any("o_proj" in name for name in model.peft_config["default"].units)
