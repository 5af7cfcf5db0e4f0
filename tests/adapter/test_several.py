"""Several adapters on one model are switched, combined, renamed and deleted; the base stays exact."""

import copy

import pytest
import torch
from support.models import ALL_RATIOS, model_of, output_of, ratios_for, token_batch, train

import s2ft
from s2ft import S2FTConfig
from s2ft.adapter import overlap
from s2ft.attached.record import attachment_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASE = "llama-grouped"


def adapter_on(seed, name, case=CASE, config=None, dtype=torch.float32):
    """A random adapter; its model is not kept."""
    model = model_of(case, dtype)
    config = config or S2FTConfig(**ratios_for(case, ALL_RATIOS), seed=seed)
    s2ft.attach(model, config, name=name)
    generator = torch.Generator().manual_seed(seed)
    for mount in attachment_of(model).mounts.values():
        mount.layer.s2.data.copy_(0.1 * torch.randn(mount.layer.s2.shape, generator=generator))
    return s2ft.get_adapter(model, name)


FIVE = {name: adapter_on(seed, name) for seed, name in enumerate("abcde")}


def states(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def loaded(names="abcde", dtype=torch.float32, trainable=None, layout="permuted"):
    model = model_of(CASE, dtype)
    if trainable:
        adapter = copy.deepcopy(FIVE[trainable])
        adapter.config.layout = layout
        s2ft.load_adapter(model, adapter, trainable=True)
    for name in names:
        if name != trainable:
            s2ft.load_adapter(model, FIVE[name], active=False)
    return model


def effective(base, weights, adapters=FIVE):
    """The base plus the weighted sum, which is formed in float32 and rounded once."""
    model = copy.deepcopy(base)
    changed = {}
    for name, weight in weights.items():
        for path, delta in adapters[name].deltas.items():
            tensor = model.get_submodule(path).weight
            wide = changed.setdefault(path, tensor.detach().float())
            wide.index_add_(delta.dim, delta.index, weight * delta.values.float())
    with torch.no_grad():
        for path, wide in changed.items():
            model.get_submodule(path).weight.copy_(wide)
    return model


# ---- operations at random ------------------------------------------------------------------------------------


# ---- weighted sums -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", (None, "a", "b"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weighted_sum_is_written_once(dtype, trainable):
    """The sum is formed in float32 and rounded once; a trainable adapter of weight 1 is added to it."""
    weights = {"a": 0.7, "b": 0.3, "c": -1.5}
    base, model = model_of(CASE, dtype), loaded(dtype=dtype, trainable=trainable)
    s2ft.set_adapter(model, weights)
    assert s2ft.status(model).active == weights
    merged, expected = s2ft.merge(model), effective(base, weights)
    for key, value in expected.state_dict().items():
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=tolerance, atol=1e-7)


def test_only_the_trainable_adapter_trains_beside_another():
    model = loaded("ab", trainable="a")
    s2ft.set_adapter(model, {"a": 1, "b": 1})
    before, others = s2ft.get_adapter(model, "a"), copy.deepcopy(FIVE["b"].deltas)
    assert all(mount.layer.enabled for mount in attachment_of(model).mounts.values())
    train(model, 2)
    after = s2ft.get_adapter(model, "a")
    assert any(not torch.equal(before.deltas[path].values, after.deltas[path].values) for path in before.deltas)
    assert all(
        torch.equal(delta.values, others[path].values)
        for path, delta in attachment_of(model).loaded["b"].deltas.items()
    )
    output = output_of(model)
    assert torch.allclose(output_of(s2ft.merge(model)), output, atol=1e-5)


def test_a_trainable_adapter_at_another_weight_is_written():
    model = loaded("ab", trainable="a")
    s2ft.set_adapter(model, {"a": 0.5})
    row = next(row for row in s2ft.status(model).rows if row.adapter == "a")
    assert (row.weight, row.active, row.trainable, row.fused) == (0.5, True, True, True)
    assert not any(mount.layer.enabled for mount in attachment_of(model).mounts.values())
    expected = effective(model_of(CASE), {"a": 0.5})
    assert torch.allclose(output_of(model), output_of(expected), atol=1e-5)


def test_combined_adapters_are_the_sum(tmp_path):
    model = loaded("abc")
    report = s2ft.combine_adapters(model, {"a": 0.7, "b": 0.3}, "sum")
    assert s2ft.status(model).active == {} and "sum" in s2ft.list_adapters(model)
    assert report.units > 0 and f"{report.share:.1%}" in str(report)
    s2ft.set_adapter(model, "sum")
    expected = effective(model_of(CASE), {"a": 0.7, "b": 0.3})
    assert torch.allclose(output_of(model), output_of(expected), atol=1e-5)
    s2ft.save_adapter(model, tmp_path, "sum")
    for trainable in (False, True):  # alone, and as a trainable adapter
        other = model_of(CASE)
        s2ft.load_adapter(other, tmp_path, trainable=trainable)
        assert torch.allclose(output_of(other), output_of(expected), atol=1e-5)
    assert s2ft.read_adapter(tmp_path).info["sum_of"] == [["a", 0.7], ["b", 0.3]]


def test_disjoint_adapters_lose_nothing():
    first = adapter_on(0, "a", config=S2FTConfig(d_ratio=0.3, o_ratio=0.25))
    second = adapter_on(1, "b", config=S2FTConfig(d_ratio=0.3, o_ratio=0.25, exclude=first.selection))
    assert overlap([first, second]).units == 0 and "disjoint" in str(overlap([first, second]))
    total = first + second
    for path, delta in total.deltas.items():
        for part in (first, second):
            where = torch.isin(delta.index, part.deltas[path].index)
            assert torch.equal(delta.values[:, where], part.deltas[path].values)
    model = model_of(CASE)
    s2ft.load_adapter(model, total)
    other = effective(effective(model_of(CASE), {"a": 1}, {"a": first}), {"b": 1}, {"b": second})
    assert same(s2ft.merge(model), other)


def test_arithmetic():
    a, b = FIVE["a"], FIVE["b"]
    path = next(iter(a.deltas))
    assert torch.equal((2 * a).deltas[path].values, 2 * a.deltas[path].values)
    assert torch.equal((-a).deltas[path].values, -a.deltas[path].values)
    nothing = a + b - b - a
    assert all(delta.values.abs().max() < 1e-6 for delta in nothing.deltas.values())
    assert (a + b).parameters < a.parameters + b.parameters
    for weight in (float("nan"), float("inf"), "much", True):
        with pytest.raises(ValueError, match="must be a finite number"):
            a * weight
    other = copy.deepcopy(b)
    other.fingerprint["layers"]["0"]["digest"] = "0"
    with pytest.raises(ValueError, match="different bases"):
        a + other


# ---- names, deleting, loading ------------------------------------------------------------------------------------


def test_deleting_the_last_adapter_gives_the_plain_model():
    model = loaded("ab")
    s2ft.set_adapter(model, "a")
    s2ft.delete_adapter(model, "a")
    assert s2ft.status(model).active == {} and same(copy.deepcopy(model), model_of(CASE))
    s2ft.delete_adapter(model, "b")
    assert s2ft.status(model).adapters == [] and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("active", ("a", "b", {"a": 1, "b": 0.5}, None))
def test_deleting_the_trainable_one_keeps_the_others(active):
    model = loaded("ab", trainable="a")
    s2ft.set_adapter(model, active)
    s2ft.delete_adapter(model, "a")
    kept = {"b": 1.0} if active == "b" else {}
    assert (s2ft.list_adapters(model), s2ft.status(model).active) == (["b"], kept)
    assert not any(p.requires_grad for p in model.parameters())
    assert same(model, effective(model_of(CASE), kept))
    assert same(s2ft.detach(model), model_of(CASE)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ("attach", "load"))
def test_training_begins_on_a_model_with_adapters(how):
    model = loaded("ab")
    s2ft.set_adapter(model, "b")
    if how == "attach":
        s2ft.attach(model, S2FTConfig(d_ratio=0.2), name="new", verify=True)
    else:
        s2ft.load_adapter(model, FIVE["c"], "new", trainable=True)
    assert (s2ft.status(model).active, s2ft.status(model).trainable) == ({"new": 1.0}, "new")
    train(model, 1)
    s2ft.set_adapter(model, "b")
    s2ft.set_adapter(model, None)
    assert same(s2ft.detach(model), model_of(CASE))


def test_a_failed_attach_restores_the_others():
    model = loaded("ab")
    s2ft.set_adapter(model, "b")
    before = states(model)
    with pytest.raises(ValueError, match="selects none"):
        s2ft.attach(model, S2FTConfig(o_ratio=0.01), name="new")
    assert s2ft.status(model).active == {"b": 1.0}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_failure_while_mounting_restores_the_others(monkeypatch):
    import s2ft.attached.mounting as mounting

    model = loaded("ab")
    s2ft.set_adapter(model, "b")
    before = states(model)

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(mounting, "_mount", fail)
    with pytest.raises(MemoryError):
        s2ft.attach(model, S2FTConfig(d_ratio=0.2), name="new")
    assert (s2ft.list_adapters(model), s2ft.status(model).active) == (["a", "b"], {"b": 1.0})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    monkeypatch.undo()
    s2ft.attach(model, S2FTConfig(d_ratio=0.2), name="new")


def test_a_failure_while_writing_leaves_no_partial_adapter(monkeypatch):
    import s2ft.attached.active as active

    model, real, calls = loaded("ab"), active.scatter_add_, []

    def fails_late(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(active, "scatter_add_", fails_late)
    with pytest.raises(MemoryError):
        s2ft.set_adapter(model, "a")
    monkeypatch.undo()
    assert s2ft.status(model).active == {} and same(copy.deepcopy(model), model_of(CASE))


def test_disabling_for_a_while():
    model = loaded("ab", trainable="a")
    s2ft.fuse(model)
    output, base = output_of(model), output_of(model_of(CASE))
    with s2ft.disable_adapters(model):
        assert torch.allclose(output_of(model), base, atol=1e-6)
        assert not torch.allclose(output, base, atol=1e-2)
    assert (
        torch.equal(output_of(model), output)
        and attachment_of(model).mounts
        and next(iter(attachment_of(model).mounts.values())).layer.fused
    )
    with pytest.raises(KeyError), s2ft.disable_adapters(model):
        raise KeyError
    assert s2ft.status(model).active == {"a": 1.0}


def test_switching_does_not_recompile():
    """Loaded adapters are written into the weights, so the graph stays. A trainable one has two graphs: on and off."""
    model = loaded("abc", trainable="a").requires_grad_(False)
    compilations = []

    def backend(graph, inputs):
        compilations.append(1)
        return graph

    compiled = torch.compile(model, backend=backend)
    batch = token_batch(model)
    for name in ("a", "b"):
        s2ft.set_adapter(model, name)
        with torch.no_grad():
            compiled(batch)
    seen = len(compilations)
    for name in ("c", "a", None, {"b": 0.5, "c": 2}, "a", "b"):
        s2ft.set_adapter(model, name)
        with torch.no_grad():
            assert torch.allclose(compiled(batch).logits, model(batch).logits, atol=1e-5)
    assert len(compilations) == seen


@pytest.mark.parametrize("case", ("phi3-grouped", "gpt2", "mixtral", "deepseek-v3", "t5"))
def test_weights_that_hold_several_projections(case):
    base = model_of(case)
    adapters = {name: adapter_on(seed, name, case) for seed, name in enumerate("ab")}
    model = copy.deepcopy(base)
    s2ft.load_adapter(model, adapters["a"], trainable=True)
    s2ft.load_adapter(model, adapters["b"], active=False)
    s2ft.set_adapter(model, {"a": 1, "b": 1})
    total = copy.deepcopy(base)
    s2ft.load_adapter(total, adapters["a"] + adapters["b"])
    assert torch.allclose(output_of(model), output_of(total), atol=1e-4)
    s2ft.set_adapter(model, "b")
    assert same(s2ft.detach(model), base)
