"""A saved adapter loads bit for bit. A faulty file is refused, and the error names the fault."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from support.models import ALL_RATIOS, CASES, model_of, ratios_for, token_batch, train
from support.pairs import pairs_mostly_slow

import s2ft
from s2ft import S2FTConfig
from s2ft.adapter import add_info, read_adapter, restore_adapter
from s2ft.adapter.formats import native
from s2ft.adapter.formats.native import CONFIG, TENSORS
from s2ft.attached.record import attachment_of
from s2ft.model.location import Location

LAYOUTS = ("permuted", "indexed")
RATIOS = {**ALL_RATIOS, "k_ratio": 1.0, "v_ratio": 1.0}


def equal(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def trained(case="llama", dtype=torch.float32, layout="permuted", seed=0, name="default", steps=3):
    model = model_of(case, dtype)
    s2ft.attach(model, S2FTConfig(**ratios_for(case, RATIOS), layout=layout, seed=seed), name=name)
    train(model, steps)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One adapter on disk; tests that spoil it copy it first."""
    folder = tmp_path_factory.mktemp("saved")
    s2ft.save_adapter(trained(), folder)
    return folder


def test_a_file_says_where_the_slices_lie_if_the_adapter_knows_its_model(saved, tmp_path):
    adapter, model = s2ft.read_adapter(saved), model_of("llama")
    found = adapter.structure.locations["model.layers.1.mlp.down_proj"]
    assert found == Location("model.layers.1.mlp.down_proj", 52)
    names = [name for pairs in adapter.structure.base_weights.values() for _, name in pairs]
    assert set(names) <= {name for name, _ in model.named_parameters()} and len(names) == 21
    native.write(replace(adapter, structure=None), tmp_path / "old")
    assert "structure" not in json.loads((tmp_path / "old" / CONFIG).read_text())
    old = s2ft.read_adapter(tmp_path / "old")
    native.write(old, tmp_path / "new", model)
    s2ft.load_adapter(model, old, "loaded")
    assert old.structure is None and s2ft.get_adapter(model, "loaded").structure == adapter.structure
    assert s2ft.read_adapter(tmp_path / "new").structure == adapter.structure
    assert (adapter + adapter).structure == adapter.structure and (adapter + old).structure is None


@pytest.mark.parametrize(
    "case,layout,dtype", pairs_mostly_slow(CASES, LAYOUTS, (torch.float32, torch.bfloat16)), ids=str
)
def test_saved_and_loaded_on_a_fresh_base_gives_the_effective_weights(case, layout, dtype, tmp_path):
    model = trained(case, dtype, layout)
    s2ft.save_adapter(model, tmp_path)
    expected = s2ft.merge(model)
    for trainable in (False, True):
        other = model_of(case, dtype)
        s2ft.load_adapter(other, tmp_path, trainable=trainable)
        if not trainable:
            assert all(torch.equal(w, expected.state_dict()[key]) for key, w in other.state_dict().items())
        assert equal(s2ft.merge(other), expected)


def test_files_are_small_and_named(saved):
    assert {path.name for path in saved.iterdir()} == {CONFIG, TENSORS}
    adapter = read_adapter(saved)
    bytes_of_deltas = sum(d.values.numel() * d.values.element_size() for d in adapter.deltas.values())
    assert (saved / TENSORS).stat().st_size < 1.2 * bytes_of_deltas + 200 * len(adapter.deltas)
    assert adapter.info["model_type"] == "llama"


def test_loaded_trainable_trains_on_like_the_original(tmp_path):
    model = trained()
    s2ft.save_adapter(model, tmp_path)
    other = model_of("llama")
    s2ft.load_adapter(other, tmp_path, trainable=True)
    assert train(model) == train(other)


def test_info_stays_with_a_trainable_adapter(tmp_path):
    """What was added is in every save, in arithmetic and after loading it to train on, until the adapter is gone."""
    model = trained(steps=1)
    add_info(model, {"prompt": {"form": "chat", "system": "Be brief.\n"}})
    add_info(model, {"note": 1})
    model.save_pretrained(tmp_path / "checkpoint")
    s2ft.save_adapter(model, tmp_path / "saved", info={"note": 2})
    assert read_adapter(tmp_path / "checkpoint").info["note"] == 1
    saved = read_adapter(tmp_path / "saved").info
    assert saved["prompt"]["system"] == "Be brief.\n" and saved["note"] == 2
    assert native.read_info(tmp_path / "saved") == saved
    assert (0.5 * s2ft.get_adapter(model, "default")).info["prompt"] == saved["prompt"]
    again = model_of("llama")
    s2ft.load_adapter(again, tmp_path / "saved", "again", trainable=True)
    s2ft.save_adapter(again, tmp_path / "again")
    assert read_adapter(tmp_path / "again").info == saved
    s2ft.attach(s2ft.detach(again), S2FTConfig(d_ratio=0.1))
    assert s2ft.get_adapter(again, "default").info == {}


def test_info_that_could_not_be_saved_is_refused_at_once(saved):
    model = trained(steps=1)
    for wrong in ({"a": float("nan")}, {"a": torch.ones(1)}):
        with pytest.raises(ValueError, match="values that JSON can hold"):
            add_info(model, wrong)
    loaded = model_of("llama")
    s2ft.load_adapter(loaded, saved)
    with pytest.raises(ValueError, match="trains no adapter; it has default"):
        add_info(loaded, {"a": 1})


def test_restore_copies_into_the_attached_model(tmp_path):
    model = trained()
    s2ft.save_adapter(model, tmp_path)
    other = model_of("llama")
    s2ft.attach(other, S2FTConfig(**RATIOS))
    restore_adapter(other, tmp_path)
    assert equal(s2ft.merge(model), s2ft.merge(other))
    another = model_of("llama")
    s2ft.attach(another, S2FTConfig(**RATIOS, seed=1))
    with pytest.raises(ValueError, match="another selection"):
        restore_adapter(another, tmp_path)


def test_an_adapter_crosses_layouts_and_dtypes(tmp_path):
    """A float32 adapter of layout permuted loads into an indexed bfloat16 model: base + delta, rounded once."""
    s2ft.save_adapter(trained(), tmp_path)
    base, other = model_of("llama", torch.bfloat16), model_of("llama", torch.bfloat16)
    s2ft.attach(other, S2FTConfig(d_ratio=0.1, layout="indexed", seed=5), name="own")
    s2ft.load_adapter(other, tmp_path, "other")
    merged = s2ft.merge(other)
    for path, delta in read_adapter(tmp_path).deltas.items():
        weight = base.get_submodule(path).weight
        expected = weight.index_copy(
            delta.dim, delta.index, (weight.index_select(delta.dim, delta.index) + delta.values).bfloat16()
        )
        assert torch.equal(merged.get_submodule(path).weight, expected)


# ---- switching -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout,dtype",
    [
        ("permuted", torch.bfloat16),
        ("indexed", torch.float16),
        *(
            pytest.param(*both, marks=pytest.mark.slow)
            for both in (
                ("permuted", torch.float32),
                ("permuted", torch.float16),
                ("indexed", torch.float32),
                ("indexed", torch.bfloat16),
            )
        ),
    ],
    ids=str,
)
def test_a_thousand_switches_restore_the_base_exactly(layout, dtype, tmp_path):
    base = model_of("llama", dtype)
    s2ft.save_adapter(trained(seed=3, name="b"), tmp_path)
    model = copy.deepcopy(base)
    s2ft.attach(model, S2FTConfig(d_ratio=0.1, layout=layout), name="a")
    if dtype is not torch.float16:  # no float16 optimizer is needed to test switching
        train(model)
    s2ft.load_adapter(model, tmp_path, "b")
    for i in range(1000):
        s2ft.set_adapter(model, ("a", "b", None)[i % 3])
    assert equal(s2ft.detach(model), base)


def test_switching_between_forward_and_backward_raises(saved):
    model = trained(name="mine", steps=1)
    s2ft.load_adapter(model, saved, "other")
    s2ft.set_adapter(model, "mine")
    loss = model(batch := token_batch(model), labels=batch).loss
    s2ft.set_adapter(model, "other")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_status_shows_active_and_trainable_apart(saved):
    model = trained(name="mine", steps=1)
    s2ft.load_adapter(model, saved, "other")
    status = s2ft.status(model)
    assert (status.adapters, status.active, status.trainable) == (["mine", "other"], {"other": 1.0}, "mine")
    rows = {(row.path, row.adapter): row for row in status.rows}
    mine = rows["model.layers.0.mlp.down_proj", "mine"]
    other = rows["model.layers.0.mlp.down_proj", "other"]
    assert (mine.active, mine.trainable, other.active, other.trainable) == (False, True, True, False)
    assert "active: other; trainable: mine" in str(status)
    assert s2ft.status(model_of("llama")).adapters == []


# ---- files that are wrong ---------------------------------------------------------------------------------


DOWN = "model.layers.1.mlp.down_proj"


def test_another_base_is_refused(saved):
    other = model_of("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 0.5
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="trained on another base: 1 of 3 layers differ, the first is layer 1"):
        s2ft.load_adapter(other, saved)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("case,message", [("qwen3", "another model|another base"), ("llama-odd", "another model")])
def test_another_model_is_refused(case, message, saved):
    with pytest.raises(ValueError, match=message):
        s2ft.load_adapter(model_of(case), saved)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_delta_that_is_not_finite_is_not_saved(value, tmp_path):
    model = trained(steps=1)
    with torch.no_grad():
        attachment_of(model).mounts[DOWN].layer.s2[0, 0] = value
    with pytest.raises(ValueError, match=f"{DOWN}: the delta is empty or not finite"):
        s2ft.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_save_leaves_the_old_adapter(saved, tmp_path, monkeypatch):
    model = trained()
    s2ft.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError):
        s2ft.save_adapter(model, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
