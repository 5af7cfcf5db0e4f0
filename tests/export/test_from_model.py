"""save_merged on one process writes the checkpoint of merge and save_pretrained, and leaves the model as it is."""

from unittest.mock import Mock

import pytest
import torch
from conversion.test_streamed import SHARDS, check_equal, without_values
from support.inside import from_model
from support.models import model_of
from support.slices import everything as config_of
from support.states import randomize, same, tensors_of, with_adapter
from torch import nn

import s2ft
from s2ft import Coupling

CASES = ("llama-grouped", "gpt2", "mixtral", "phi3", "qwen2-grouped-tied")


def trained(case, folder, layout="permuted", **changes):
    """A base with a trainable adapter, as after training."""
    base = model_of(case, torch.bfloat16)
    base.save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base")
    return randomize(with_adapter(base, config_of(case, layout=layout, **changes)))


def with_another(case, folder, layout, weights):
    """A base with a loaded adapter "a" and a trainable one "b", both active with these weights."""
    model = trained(case, folder, layout, seed=3)
    s2ft.save_adapter(model, folder / "a")
    s2ft.load_adapter(s2ft.detach(model), folder / "a", "a")
    randomize(with_adapter(model, config_of(case, layout=layout), "b"))
    s2ft.set_adapter(model, weights)
    return model


def check_saved(model, folder, caplog, gathered=False, is_base_known=False, **options):
    """Save and compare with merging in memory. Check that the model does not change, and where the base was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    status = str(s2ft.status(model))
    caplog.set_level("INFO")
    if gathered and not is_base_known:
        model.config._name_or_path = ""
    s2ft.save_merged(model, folder / "saved", **options)
    assert ("gathered from the model" in caplog.text) == gathered
    assert str(s2ft.status(model)) == status and same(model, before)
    sizes = {key: value for key, value in options.items() if key == "max_shard_size"}
    s2ft.merge(model).save_pretrained(folder / "expected", **sizes)
    check_equal(folder / "saved", folder / "expected")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout, gathered", [("permuted", True), ("indexed", False)])
def test_the_trained_model_is_saved_as_merging_saves_it(case, layout, gathered, tmp_path, caplog):
    check_saved(trained(case, tmp_path, layout), tmp_path, caplog, gathered)


@pytest.mark.parametrize("gathered", (True, False))
@pytest.mark.parametrize(
    "weights", ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.25}, {"a": -2.0}), ids=("sum", "scaled", "loaded")
)
def test_active_adapters_and_their_weights_are_saved(weights, gathered, tmp_path, caplog):
    check_saved(with_another("llama-grouped", tmp_path, "permuted", weights), tmp_path, caplog, gathered)


@pytest.mark.parametrize("gathered", (True, False))
def test_extra_weights_and_small_files(gathered, tmp_path, caplog):
    model = trained("qwen2-grouped-tied", tmp_path, modules_to_save=["norm", "lm_head"])
    check_saved(model, tmp_path, caplog, gathered, max_shard_size=SHARDS)


def test_a_model_without_values_is_saved_from_its_checkpoint(tmp_path, caplog):
    model = trained("llama-grouped", tmp_path)
    s2ft.save_adapter(model, tmp_path / "adapter")
    s2ft.merge(model).save_pretrained(tmp_path / "expected")
    hollow = without_values(model, torch.bfloat16)
    with s2ft.weights_on_disk(hollow, tmp_path / "base"):
        s2ft.load_adapter(hollow, tmp_path / "adapter", trainable=True)
    s2ft.save_merged(hollow, tmp_path / "saved", base=tmp_path / "base")
    check_equal(tmp_path / "saved", tmp_path / "expected")


# ---- the checkpoint is not the base ----------------------------------------------------------------------


def with_other(name):
    """Save the base with another weight."""

    def change(case, folder):
        model = model_of(case, torch.bfloat16)
        dict([*model.named_parameters(), *model.named_buffers()])[name].data.add_(1)
        model.save_pretrained(folder)

    return change


NORM = "model.layers.1.self_attn.q_norm.weight"  # its heads move
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"  # a buffer
OTHER = "has other weights than the base of this model: "


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("llama", with_other("model.layers.1.mlp.up_proj.weight"), f"{OTHER}1 of 3 layers differ"),
        ("llama", with_other("lm_head.weight"), f"{OTHER}lm_head.weight differs"),
        ("olmo2", with_other(NORM), f"{OTHER}{NORM} differs"),
        ("deepseek-v3", with_other(CORRECTION), f"{OTHER}{CORRECTION} differs"),
        ("llama", lambda case, folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    ],
)
def test_a_checkpoint_with_other_weights_is_not_used_and_refused_if_it_was_given(
    case, change, message, tmp_path, caplog
):
    model = trained(case, tmp_path)
    change(case, tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        s2ft.save_merged(model, tmp_path / "saved", base=tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    check_saved(model, tmp_path, caplog, gathered=True, is_base_known=True)
    assert message in caplog.text


# ---- what is refused -------------------------------------------------------------------------------------


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = trained("llama", tmp_path)
    net = with_adapter(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)),
        s2ft.S2FTConfig(d_ratio=0.25),
        couplings=[Coupling.ffn(0, up="0", down="2", channels=32)],
    )
    added, removed = trained("llama", tmp_path), trained("llama", tmp_path)
    added.value_head, removed.lm_head = nn.Linear(24, 1), nn.Identity()
    for one, folder, options, word in (
        (added, "saved", {}, "value_head.weight was added"),
        (removed, "saved", {}, "lm_head.weight was changed or removed"),
        (model, "saved", {"max_shard_size": "0GB"}, "max_shard_size"),
        (model, "nowhere/saved", {}, "folder that doesn't exist"),
        (net, "saved", {}, "no model of it"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=word):
            s2ft.save_merged(one, tmp_path / folder, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    model = trained("llama", tmp_path)
    monkeypatch.setattr(from_model, "write_config", Mock(side_effect=OSError("no space left on device")))
    for name in ("", str(tmp_path / "base")):
        model.config._name_or_path = name
        with pytest.raises(OSError, match="no space"):
            s2ft.save_merged(model, tmp_path / "saved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"] and tensors_of(tmp_path / "base")
