"""A saved adapter loads bit for bit. A faulty file is refused, and the error names the fault."""

import json
from dataclasses import replace

import pytest
from support.inside import CONFIG, Location, add_info, native
from support.models import WHOLE_KEYS, fit, model_of, ratios_for, token_batch
from support.states import saved_adapter, with_adapter, with_loaded

import s2ft
from s2ft import S2FTConfig, read_adapter


def trained(name="default", steps=3):
    return fit(with_adapter(model_of("llama"), S2FTConfig(**ratios_for("llama", WHOLE_KEYS)), name=name), steps)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One adapter on disk; tests that spoil it copy it first."""
    return saved_adapter(trained(), tmp_path_factory.mktemp("saved"))


def test_a_file_says_where_the_slices_lie_if_the_adapter_knows_its_model(saved, tmp_path):
    adapter, model = s2ft.read_adapter(saved), model_of("llama")
    assert adapter.structure.locations["model.layers.1.mlp.down_proj"] == Location("model.layers.1.mlp.down_proj", 52)
    names = [name for pairs in adapter.structure.base_weights.values() for _, name in pairs]
    assert set(names) <= {name for name, _ in model.named_parameters()} and len(names) == 21
    native.write(replace(adapter, structure=None), tmp_path / "old")
    assert "structure" not in json.loads((tmp_path / "old" / CONFIG).read_text())
    old = s2ft.read_adapter(tmp_path / "old")
    s2ft.load_adapter(model, old, "loaded")
    assert old.structure is None and s2ft.get_adapter(model, "loaded").structure == adapter.structure
    assert (adapter + adapter).structure == adapter.structure and (adapter + old).structure is None


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
    assert (0.5 * s2ft.get_adapter(model, "default")).info["prompt"] == saved["prompt"]
    again = with_loaded(model_of("llama"), tmp_path / "saved", "again", trainable=True)
    s2ft.save_adapter(again, tmp_path / "again")
    assert read_adapter(tmp_path / "again").info == saved
    s2ft.freeze_adapter(again)
    s2ft.save_adapter(again, tmp_path / "third", info={"note": 3})
    assert s2ft.get_adapter(again, "again").info["note"] == 2  # what one save adds is in its files alone
    s2ft.attach(s2ft.detach(again), S2FTConfig(d_ratio=0.1))
    assert s2ft.get_adapter(again, "default").info == {}


# ---- the report of a loaded adapter ----------------------------------------------------------------------


def test_loading_reports_what_attach_has_reported(saved):
    attached = s2ft.attach(model_of("llama"), S2FTConfig(**ratios_for("llama", WHOLE_KEYS)))
    model = model_of("llama")
    loaded = s2ft.load_adapter(model, saved)
    assert replace(loaded, is_frozen=False) == attached and loaded.share == attached.share
    assert str(loaded).endswith(f"parameters were trained, and are frozen now ({attached.share:.2%})")
    assert s2ft.load_adapter(model, saved, "again", trainable=True) == replace(attached, name="again")
    assert replace(s2ft.load_adapter(model, saved, "third"), name="default") == loaded  # beside a trainable one


# ---- switching -------------------------------------------------------------------------------------------


def test_switching_between_forward_and_backward_raises(saved):
    model = with_loaded(trained(name="mine", steps=1), saved, "other")
    s2ft.set_adapter(model, "mine")
    loss = model(batch := token_batch(model), labels=batch).loss
    s2ft.set_adapter(model, "other")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
