"""Several adapters on one model are switched, combined, renamed and deleted; the base stays exact."""

import copy

import pytest
import torch
import torch._dynamo.testing
from state.models import make_adapter, ratios, tiny_model
from support.models import ALL_RATIOS, model_of, output_of, ratios_for, token_batch
from support.states import same, with_loaded

import s2ft
from s2ft import S2FTConfig

CASE = "llama-grouped"


def adapters_of(case, names):
    """Random adapters; their models are not kept."""
    return {
        name: make_adapter(model_of(case), S2FTConfig(**ratios_for(case, ALL_RATIOS), seed=seed), name, seed)
        for seed, name in enumerate(names)
    }


TWO = adapters_of(CASE, "ab")


# ---- weighted sums -------------------------------------------------------------------------------------------


def test_combined_adapters_are_the_sum(tmp_path):
    model = model_of(CASE)
    for name in "ab":
        s2ft.load_adapter(model, TWO[name], active=False)
    report = s2ft.combine_adapters(model, {"a": 0.7, "b": 0.3}, "sum")
    assert s2ft.status(model).active == {} and "sum" in s2ft.list_adapters(model)
    assert report.units > 0 and f"{report.share:.1%}" in str(report)
    s2ft.set_adapter(model, {"a": 0.7, "b": 0.3})  # tests/state compares this with a sum of its own
    expected = output_of(model)
    s2ft.set_adapter(model, "sum")
    assert torch.allclose(output_of(model), expected, atol=1e-5)
    s2ft.save_adapter(model, tmp_path, "sum")
    for trainable in (False, True):  # alone, and as a trainable adapter
        assert torch.allclose(
            output_of(with_loaded(model_of(CASE), tmp_path, trainable=trainable)), expected, atol=1e-5
        )
    assert s2ft.read_adapter(tmp_path).info["sum_of"] == [["a", 0.7], ["b", 0.3]]


def test_an_adapter_is_deleted_while_all_are_off():
    model = with_loaded(with_loaded(model_of(CASE), TWO["a"]), TWO["b"])
    s2ft.set_adapter(model, {"a": 1.0, "b": 0.5})
    with s2ft.disable_adapters(model):
        s2ft.delete_adapter(model, "a")
    assert s2ft.status(model).active == {"b": 0.5}


def test_memory_that_processes_share_stays_as_it_is():
    """torch.multiprocessing sends weights so. The other processes go on with the adapter."""
    model = with_loaded(model_of(CASE), TWO["a"]).share_memory()
    held = {name: value.detach() for name, value in model.named_parameters()}
    before = {name: value.clone() for name, value in held.items()}
    s2ft.set_adapter(model, None)
    assert same(held, before) and same(model, model_of(CASE))


def test_arithmetic():
    a, b = TWO["a"], TWO["b"]
    path = next(iter(a.deltas))
    assert torch.equal((2 * a).deltas[path].values, 2 * a.deltas[path].values)
    assert torch.equal((-a).deltas[path].values, -a.deltas[path].values)
    assert all(delta.values.abs().max() < 1e-6 for delta in (a + b - b - a).deltas.values())
    assert (a + b).parameters < a.parameters + b.parameters
    for weight in (float("nan"), float("inf"), "much", True):
        with pytest.raises(ValueError, match="must be a finite number"):
            a * weight
    other = copy.deepcopy(b)
    other.fingerprint["layers"]["0"]["digest"] = "0"
    with pytest.raises(ValueError, match="different bases"):
        a + other


# ---- names, deleting, loading ------------------------------------------------------------------------------------


def test_switching_does_not_recompile():
    """Loaded adapters are written into the weights, so the graph stays. A trainable one has two graphs: on and off."""
    model = tiny_model("llama")
    adapters = [make_adapter(model, S2FTConfig(**ratios("llama"), seed=i), name, i) for i, name in enumerate("abc")]
    for adapter in adapters:
        s2ft.load_adapter(model, adapter, active=False, trainable=adapter.name == "a")
    model.requires_grad_(False)
    counter, batch = torch._dynamo.testing.CompileCounter(), token_batch(model)
    compiled = torch.compile(model, backend=counter)
    for name in ("a", "b"):
        s2ft.set_adapter(model, name)
        with torch.no_grad():
            compiled(batch)
    seen = counter.frame_count
    for name in ("c", "a", None, {"b": 0.5, "c": 2}, "a", "b"):
        s2ft.set_adapter(model, name)
        with torch.no_grad():
            assert torch.allclose(compiled(batch).logits, model(batch).logits, atol=1e-5)
    assert counter.frame_count == seen


@pytest.mark.parametrize("case", ("phi3-grouped", "gpt2", "mixtral", "deepseek-v3", "t5"))
def test_weights_that_hold_several_projections(case):
    base = model_of(case)
    adapters = adapters_of(case, "ab")
    model = with_loaded(with_loaded(copy.deepcopy(base), adapters["a"], trainable=True), adapters["b"], active=False)
    s2ft.set_adapter(model, {"a": 1, "b": 1})
    total = with_loaded(copy.deepcopy(base), adapters["a"] + adapters["b"])
    assert torch.allclose(output_of(model), output_of(total), atol=1e-4)
    s2ft.set_adapter(model, "b")
    assert same(s2ft.detach(model), base)
