"""An adapter in the weights of a checkpoint of compressed-tensors or in NF4, and training through the codec."""

import json
import shutil
from functools import partial

import pytest
import torch
import transformers
from conversion.test_codec_training import train
from conversion.test_packed import WIDE
from safetensors.torch import load_file, save_file
from support.inside import export_packed, load_model, packed_base, tuned_weights
from support.packed_folders import compress, to_nf4
from support.states import with_adapter
from train.tiny import base_of
from transformers import AutoModelForCausalLM

import s2ft
from s2ft import S2FTConfig
from s2ft.cli.main import main

WEIGHTS = ("q_proj", "o_proj", "up_proj", "down_proj")
RATIOS = {"q_ratio": 0.5, "o_ratio": 0.5, "u_ratio": 0.25, "d_ratio": 0.25}
FORMATS = {
    "int4": partial(compress, num_bits=4, type="int", strategy="group", group_size=32),
    "int4 with zeros": partial(compress, num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
    "int8 by group": partial(compress, num_bits=8, type="int", strategy="group", group_size=32),
    "int8": partial(compress, num_bits=8, type="int", strategy="channel"),
    "fp8": partial(compress, num_bits=8, type="float", strategy="tensor"),
    "fp8 by channel": partial(compress, num_bits=8, type="float", strategy="channel"),
    "fp8 by block": partial(compress, num_bits=8, type="float", strategy="block", block_structure=[64, 64]),
    "nvfp4": partial(
        compress,
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    ),
    "nf4": partial(to_nf4, nested=False),
    "nf4 nested": partial(to_nf4, nested=True),
}


def make_base(folder, form, **options):
    return FORMATS[form](base_of(folder / "checkpoint", **WIDE), folder / "base", **options)


@pytest.fixture(scope="module", params=FORMATS)
def base(request, tmp_path_factory):
    if request.param == "int4 with zeros" and transformers.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 can't unpack zero points")
    return make_base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("int8"), "int8")


def trained(base, **changes):
    model = load_model(str(base), "bfloat16")[0]
    group = 64 if "nf4" in str(json.loads((base / "config.json").read_text())["quantization_config"]) else 32
    model = with_adapter(
        model, S2FTConfig(**{**RATIOS, "codec": "auto", "group": group, "layout": "indexed", **changes})
    )
    losses = train(model)
    assert losses[-1] < losses[0]
    return model


def computed_with(model, path):
    """The weight of a layer that the forward multiplies by."""
    layer = model.get_submodule(path)
    if not hasattr(layer, "linear"):
        return layer.weight.detach().clone()
    weight = layer.kind.matrix(layer).float()
    return weight.index_add(
        layer.dim, layer.selected_units(), (layer.rounding(layer.s2) - layer.rounding.base).detach()
    )


def plain_weights(base):
    """The weights of a checkpoint by the paths of their modules, as its library unpacks them."""
    model = load_model(str(base), "bfloat16")[0]
    kinds = [(path, layer) for path, layer in model.named_modules() if path.endswith(WEIGHTS)]
    return {path: s2ft.layers.kind_of(layer).matrix(layer).detach() for path, layer in kinds}


def test_the_merged_folder_is_what_training_multiplied_by(base, tmp_path):
    model = trained(base)
    s2ft.save_adapter(model, tmp_path / "adapter")
    assert "and no other byte of a weight" in export_packed(str(base), tmp_path / "adapter", tmp_path / "tuned")
    before, after = plain_weights(base), plain_weights(tmp_path / "tuned")
    for path, value in after.items():
        assert torch.equal(value.float(), computed_with(model, path).float()), path
    assert sum(not torch.equal(value, before[path]) for path, value in after.items()) > 4
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "tuned/model.safetensors")
    changed = {
        name.rpartition(".weight")[0]
        for name in old
        if not torch.equal(*(one[name].view(torch.uint8) for one in (old, new)))
    }
    assert all(path.endswith(WEIGHTS) for path in changed)
    sent = dict(tuned_weights(str(base), tmp_path / "adapter"))
    assert all(torch.equal(value.view(torch.uint8), new[name].view(torch.uint8)) for name, value in sent.items())
    modules = {path.rpartition(".")[0] for path in changed}
    assert sent.keys() == {name for name in new if name.startswith(tuple(f"{module}." for module in modules))}
    merged = json.loads((tmp_path / "tuned/s2ft_merged.json").read_text())
    assert [(one["base"], one["adapter"]) for one in merged] == [(str(base), "default")]
    with pytest.raises(ValueError, match="inside the base's folder"):
        export_packed(str(base), tmp_path / "adapter", base / "tuned")


def test_a_layer_that_is_not_packed_stays(tmp_path):
    base = make_base(tmp_path, "int8", ignore=["lm_head", "model.layers.1.mlp.up_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))  # as Mamba's
    model, form = (
        trained(base, u_ratio=0.0),
        {"form": "chat", "template": "{{ messages[-1]['content'] }}", "system": None},
    )
    s2ft.save_adapter(model, tmp_path / "adapter", info={"prompt": form})
    assert "and no other byte" in export_packed(str(base), tmp_path / "adapter", tmp_path / "tuned")
    assert load_model(str(tmp_path / "tuned"))[1].chat_template == form["template"]


def test_merge_keeps_the_format_unless_a_dtype_is_given(int8, tmp_path, capsys):
    s2ft.save_adapter(trained(int8), tmp_path / "adapter")
    words = ["merge", "--model", str(int8), "--adapter", str(tmp_path / "adapter")]
    assert main([*words, "--output", str(tmp_path / "packed")]) == 0
    assert "no other byte of a weight" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "plain"), "--dtype", "bfloat16"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("another base", "trained on another base"),
        ("no codec", "no checkpoint of compressed-tensors or in NF4"),
        ("replaced", "may have been replaced"),
    ],
)
def test_bad_input_leaves_nothing(int8, tmp_path, mistake, words):
    with pytest.raises(ValueError, match=words):
        if mistake == "replaced":
            model = load_model(str(int8), "bfloat16")[0]
            model.model.layers[0].mlp.down_proj.weight.data += 1
            s2ft.attach(model, S2FTConfig(d_ratio=1.0, codec="auto"))
        s2ft.save_adapter(trained(int8), tmp_path / "adapter")
        base = base_of(tmp_path / "other", seed=1, **WIDE)
        if mistake == "another base":
            base = FORMATS["int8"](base, tmp_path / "base")
        export_packed(str(base), tmp_path / "adapter", tmp_path / "tuned")
    assert not (tmp_path / "tuned").exists()


@pytest.mark.parametrize("form", ("nf4", "int8"))
def test_an_adapter_is_not_merged_into_a_base_that_differs_in_a_norm(form, tmp_path):
    base = make_base(tmp_path, form)
    s2ft.save_adapter(trained(base), tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][-1] *= 2
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="trained on another base. Its base has the sha256 .*, and base has"):
        export_packed(str(base), tmp_path / "adapter", tmp_path / "tuned")


def test_a_checkpoint_that_lacks_a_weight_is_refused(int8, tmp_path):
    folder = shutil.copytree(int8, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if name != "model.norm.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks weights of the model, such as model.norm.weight"):
        load_model(str(folder))


def test_what_transformers_can_not_unpack_is_refused(int8, tmp_path):
    with pytest.raises(ValueError, match="dequantize=True"):
        s2ft.attach(AutoModelForCausalLM.from_pretrained(int8), S2FTConfig(d_ratio=0.25))
    config = json.loads((int8 / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    by_name = {**group, "targets": ["re:.*down_proj"], "weights": {**group["weights"], "num_bits": 4}}
    config["quantization_config"]["config_groups"] = {"first": group, "second": by_name}
    folder = shutil.copytree(int8, tmp_path / "two")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="in several formats"):
        load_model(str(folder))
    codecs = [packed_base(str(folder)).codec(f"model.layers.0.mlp.{name}") for name in ("up_proj", "down_proj")]
    assert [codec.bits for codec in codecs] == [8, 4]  # a name precedes a class
