"""What is sent: the slices of the checkpoint's tensors, with the numbers that merging writes."""

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.aliases import alias_of
from support.checkpoint_engine import CheckpointEngine
from support.composites import composite_of
from support.inside import SlicesTrainedSlices as TrainedSlices, hashes_of, to_message
from support.models import ALL_RATIOS, CASES, model_of, ratios_for
from support.pairs import rest_slow
from support.states import randomize, same, tensors_of, with_adapter

import s2ft

ALL = rest_slow(CASES, ("llama-grouped", "gpt2", "mixtral", "qwen2-grouped-tied"))


def check(model, folder, merge):
    """An engine that gets the slices, and checks the base's hashes, has the tensors of the merged checkpoint."""
    slices = TrainedSlices.of(model)
    randomize(model)
    engine = CheckpointEngine(folder / "base", slices.dtype)
    dtype = str(slices.dtype).removeprefix("torch.")
    engine.receiver.bind({"sender": "me", "dtype": dtype, "slices": to_message(slices.specs)})
    engine.receiver.update({"sender": "me", "step": 0, "tensor": slices.buffer()})
    merge().save_pretrained(folder / "merged")
    expected, base = tensors_of(folder / "merged"), tensors_of(folder / "base")
    assert same(engine.weights, {name: tensor.to(slices.dtype) for name, tensor in expected.items()})
    changed = [name for name, tensor in expected.items() if not torch.equal(tensor, base[name])]
    assert set(changed) <= {spec.name for spec in slices.specs} and changed
    return slices


def attached(model, **config):
    return with_adapter(model, s2ft.S2FTConfig(**config))


def peft_form(model, autocast=False, **config):
    from s2ft.peft import S2FTPeftConfig

    return get_peft_model(model, S2FTPeftConfig(**config), autocast_adapter_dtype=autocast)


def in_form(model, form, **config):
    """Attached in a layout, or in PEFT's form."""
    return peft_form(model, **config) if form == "peft" else attached(model, **config, layout=form)


def merged(model):
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else s2ft.merge(model)


@pytest.mark.parametrize("form", ["permuted", "indexed", "peft"])
@pytest.mark.parametrize("case", ALL)
def test_slices_are_those_of_the_merged_checkpoint(case, form, tmp_path):
    model, ratios = model_of(case), ratios_for(case, ALL_RATIOS)
    model.save_pretrained(tmp_path / "base")
    model = in_form(model, form, **ratios)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert check(model, tmp_path, lambda: merged(model)).numel == trained


# ---- weights in full, dtypes, several adapters ---------------------------------------------------------


def unfrozen(model):
    """Its norm by its name, and a norm of a block that was unfrozen by hand."""
    model = attached(model, d_ratio=0.1, modules_to_save=["model.norm"])
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    return model


def two_adapters(model):
    from s2ft.peft import S2FTPeftConfig

    model = peft_form(model, d_ratio=0.1, seed=1)
    model.add_adapter("two", S2FTPeftConfig(d_ratio=0.2, o_ratio=0.5, seed=2), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "two"])
    return model


def ran_before(model):
    model = randomize(peft_form(model, d_ratio=0.2))
    model(torch.arange(4)[None])  # PEFT's form has base + delta in the weights now
    return model


WIDE = dict(d_ratio=0.1, o_ratio=0.5)
MADE = {  # the case, its dtype, what is made of it, and the name of a tensor that is sent
    "norms in full": ("llama-grouped", torch.float32, unfrozen, "model.layers.1.input_layernorm.weight"),
    "a tied head": (
        "qwen2-grouped-tied",
        torch.float32,
        lambda model: attached(model, d_ratio=0.1, modules_to_save=["lm_head"]),
        "model.embed_tokens.weight",
    ),
    "modules_to_save of PEFT": (
        "llama-grouped",
        torch.float32,
        lambda model: peft_form(model, d_ratio=0.1, modules_to_save=["lm_head"]),
        "lm_head.weight",
    ),
    "a float32 delta of a bfloat16 base": (
        "llama-grouped",
        torch.bfloat16,
        lambda model: attached(model, **WIDE, delta_dtype="float32"),
        None,
    ),
    "PEFT's float32 delta of it": ("llama-grouped", torch.bfloat16, lambda model: peft_form(model, True, **WIDE), None),
    "a forward before the description": ("llama-grouped", torch.float32, ran_before, None),
    "two adapters of PEFT": ("llama-grouped", torch.float32, two_adapters, None),
}


@pytest.mark.parametrize("name", MADE)
def test_all_that_is_trained_is_sent_as_it_is_merged(name, tmp_path):
    case, dtype, make, sends = MADE[name]
    model = model_of(case, dtype)
    model.save_pretrained(tmp_path / "base")
    model = make(model)
    slices = check(model, tmp_path, lambda: merged(model))
    assert slices.dtype == dtype and (sends is None or sends in {spec.name for spec in slices.specs})


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl", "gemma3"])
def test_models_of_images_and_text_have_the_names_of_their_files(model_type, tmp_path):
    model = composite_of(model_type)
    model.save_pretrained(tmp_path / "base")
    model = attached(type(model).from_pretrained(tmp_path / "base"), d_ratio=0.2, u_ratio=0.1, o_ratio=0.5)
    check(model, tmp_path, lambda: s2ft.merge(model))


# ---- refusals ------------------------------------------------------------------------------------------


def trained_bias():
    model = attached(model_of("llama-biased"), d_ratio=0.1)
    model.model.layers[0].mlp.down_proj.bias.requires_grad_(True)
    return model


def merged_adapter():
    model = peft_form(model_of("llama-grouped"), d_ratio=0.1)
    model.merge_adapter()
    return model


def quantized():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = model_of("llama-grouped")
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return attached(model, d_ratio=0.2, layout="indexed")


REFUSED = {
    "no adapter": (lambda: model_of("llama-grouped"), "no S²FT adapter"),
    "a bias of a coupling": (trained_bias, "down_proj.bias requires a gradient"),
    "LoRA": (lambda: get_peft_model(model_of("llama-grouped"), LoraConfig(target_modules=["down_proj"])), "LoraConfig"),
    "tokens": (lambda: peft_form(model_of("llama-grouped"), d_ratio=0.1, trainable_token_indices=[3]), "token_indices"),
    "a merged adapter": (merged_adapter, "unmerge_adapter"),
    "a quantized base": (quantized, "down_proj is quantized"),
    "experts in one tensor": (lambda: attached(alias_of("gpt_oss"), d_ratio=0.2), "one tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_sent_is_refused(name):
    make, word = REFUSED[name]
    with pytest.raises(ValueError, match=word):
        TrainedSlices.of(make())


def test_what_changes_after_the_description_is_noticed(tmp_path):
    model = attached(model_of("llama-grouped"), d_ratio=0.1)
    s2ft.save_adapter(model, tmp_path / "old")
    slices = TrainedSlices.of(model)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="model.norm.weight was unfrozen"):
        slices.buffer()
    s2ft.load_adapter(s2ft.detach(model), tmp_path / "old", "old")
    with pytest.raises(ValueError, match="attach one"):
        TrainedSlices.of(model)
    slices = TrainedSlices.of(attached(model, d_ratio=0.1))
    s2ft.delete_adapter(model, "default")
    attached(model, d_ratio=0.1, seed=1)
    with pytest.raises(RuntimeError, match="another adapter is trained"):
        slices.buffer()
    slices = TrainedSlices.of(model)
    s2ft.set_adapter(model, None)
    with pytest.raises(ValueError, match="set_adapter"):
        slices.buffer()
    s2ft.set_adapter(model, {"old": 1.0, "default": 1.0})
    with pytest.raises(ValueError, match="'old' is active together"):
        TrainedSlices.of(model)
    model = peft_form(model_of("llama-grouped"), d_ratio=0.1)
    slices = TrainedSlices.of(model)
    with model.disable_adapter(), pytest.raises(ValueError, match="are disabled"):
        slices.buffer()


def test_a_model_that_is_not_of_transformers_has_the_names_of_its_weights():
    model = torch.nn.Sequential(
        OrderedDict(up=torch.nn.Linear(6, 20), act=torch.nn.ReLU(), down=torch.nn.Linear(20, 6))
    )
    base = {name: one.clone() for name, one in model.state_dict().items()}
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25, layout="indexed"), example=torch.randn(2, 6))
    slices = TrainedSlices.of(model)
    randomize(model)
    (spec,) = slices.specs
    values = slices.buffer().view(spec.values_shape)
    merged = s2ft.merge(model).state_dict()
    assert spec.name == "down.weight" and torch.equal(merged[spec.name].index_select(1, spec.index), values)
    assert torch.equal(hashes_of(base[spec.name].index_select(1, spec.index), 1), spec.hashes)
