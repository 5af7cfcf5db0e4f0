"""Weights that stay in a checkpoint: s2ft reads them one at a time and gets the values of `from_pretrained`."""

import json
import shutil
import weakref

import pytest
import torch
from conversion.test_streamed import without_values
from support.commands import s2ft_command
from support.inside import SOURCE, StoredTensor, StoredWeights, lay_out, open_checkpoint, record_of
from support.models import ALL_RATIOS, CASES, model_of, ratios_for
from support.pairs import rest_slow
from torch import nn

import s2ft
from s2ft import Coupling, Selection

FAST = ("llama-grouped", "gpt2", "mixtral", "phi3")


@pytest.fixture
def stored(tmp_path):
    """Save the model of a case in float32. Returns it in bfloat16, the same without values, and the folder."""

    def make(case):
        model = model_of(case)
        model.save_pretrained(tmp_path / "base")
        loaded = type(model).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
        return loaded, without_values(model, torch.bfloat16), tmp_path / "base"

    return make


@pytest.mark.parametrize("case", rest_slow(CASES, FAST))
def test_every_weight_is_read_as_transformers_loads_it(case, stored):
    loaded, hollow, folder = stored(case)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"old": "old.safetensors"}}')  # left behind
    weights = StoredWeights(hollow, open_checkpoint(folder))
    assert weights.unused == []
    for name, expected in loaded.state_dict().items():
        found = weights.read(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


@pytest.mark.parametrize("case, layout", [(case, "indexed") for case in FAST] + [("llama-grouped", "permuted")])
def test_selection_and_fingerprint_are_those_of_the_loaded_model(case, layout, stored):
    loaded, hollow, folder = stored(case)
    config = s2ft.S2FTConfig(**ratios_for(case, ALL_RATIOS), selection="weight", layout=layout)
    with s2ft.weights_on_disk(hollow, folder) as inside:
        assert inside is hollow
        report = s2ft.attach(hollow, config)
    found = s2ft.attach(loaded, config)
    assert (report.rows, report.trainable, report.total) == (found.rows, found.trainable, found.total)
    assert record_of(hollow).selection == record_of(loaded).selection
    assert record_of(hollow).fingerprint == record_of(loaded).fingerprint
    assert [name for name, tensor in hollow.named_parameters() if tensor.is_meta == name.endswith(".s2")] == []


def test_selection_needs_the_memory_of_one_weight(stored, monkeypatch):
    _, hollow, folder = stored("llama-grouped")
    read, living, most = StoredTensor.read, [], [0]

    def count(self):
        found = read(self)
        living.append(weakref.ref(found.untyped_storage()))
        most[0] = max(most[0], sum(storage.nbytes() for one in living if (storage := one()) is not None))
        return found

    monkeypatch.setattr(StoredTensor, "read", count)
    with s2ft.weights_on_disk(hollow, folder):
        s2ft.attach(hollow, s2ft.S2FTConfig(**ALL_RATIOS, selection="weight"))
    largest = max(
        stored.bytes for stored in open_checkpoint(folder).tensors.values()
    )  # float32; it is read to bfloat16
    assert len(living) > 40 and most[0] <= 2 * largest


def sources(model):
    return [name for name, tensor in model.named_parameters() if hasattr(tensor, SOURCE)]


def test_the_model_forgets_its_checkpoint_also_after_an_error(stored):
    _, hollow, folder = stored("llama")
    with pytest.raises(KeyboardInterrupt), s2ft.weights_on_disk(hollow, folder):
        assert len(sources(hollow)) == len(dict(hollow.named_parameters()))
        raise KeyboardInterrupt
    assert sources(hollow) == []
    with pytest.raises(ValueError, match="on the meta device"):
        s2ft.select(hollow, s2ft.S2FTConfig(d_ratio=0.1, selection="weight"))


def test_weights_that_have_values_are_not_read(stored):
    loaded, _, folder = stored("llama")
    config = s2ft.S2FTConfig(d_ratio=0.1, selection="weight")
    before = s2ft.select(loaded, config)
    weight = loaded.model.layers[0].mlp.down_proj.weight
    weight.data.mul_(torch.arange(1, 1 + weight.shape[1]).to(weight))
    expected = s2ft.select(loaded, config)
    assert expected != before
    with s2ft.weights_on_disk(loaded, folder):
        assert sources(loaded) == [] and s2ft.select(loaded, config) == expected


def test_a_model_of_your_own_is_read_by_the_names_of_its_weights(tmp_path):
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    places = lay_out(tmp_path / "model.safetensors", net.state_dict())
    for name, tensor in net.state_dict().items():
        places[name].write([tensor])
    with torch.device("meta"):
        hollow = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    options = dict(couplings=[Coupling.ffn(0, up="0", down="2", channels=32)])
    config = s2ft.S2FTConfig(d_ratio=0.25, selection="weight")
    with s2ft.weights_on_disk(hollow, tmp_path):
        assert s2ft.select(hollow, config, **options) == s2ft.select(net, config, **options)


# ---- files that do not fit -----------------------------------------------------------------------------


def without_files(folder):
    (folder / "model.safetensors").unlink()


def without_a_shard(folder):
    model_of("llama").save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*"))[1].unlink()


def without_a_tensor(folder):
    without_files(folder)
    index = {"weight_map": {"model.norm.weight": "one.safetensors", "lm_head.weight": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lay_out(folder / "one.safetensors", {"lm_head.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    "change, error, message",
    [
        (without_files, ValueError, "has no model.safetensors"),
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, "no checkpoint"),  # it is not sought on the hub
        (
            lambda folder: model_of("llama-multi-query").save_pretrained(folder),
            ValueError,
            r"in the checkpoint, and .* in the model",
        ),
        (without_a_shard, FileNotFoundError, "names model-00002-of-.*, which does not exist there"),
        (without_a_tensor, ValueError, "names model.norm.weight, which is not in one.safetensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error(change, error, message, stored):
    _, hollow, folder = stored("llama")
    change(folder)
    with pytest.raises(error, match=message), s2ft.weights_on_disk(hollow, folder):
        pass


# ---- the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ("weight", "random"))
def test_select_does_not_load_the_model(metric, stored, tmp_path, monkeypatch):
    model, _, folder = stored("llama-grouped")
    expected = s2ft.select(type(model).from_pretrained(folder), s2ft.S2FTConfig(d_ratio=0.2, selection=metric))
    monkeypatch.setattr("s2ft.text.models.load_model", None)
    if metric == "random":
        without_files(folder)
    words = ("select", "--model", folder, "--output", tmp_path / "units.json", "--d-ratio", 0.2, "--selection", metric)
    assert s2ft_command(*words) == 0 and Selection.load(tmp_path / "units.json") == expected
