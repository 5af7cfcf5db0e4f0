"""Towers: which part of a model is trained where it takes images or sound besides text."""

import json

import pytest
import torch
import transformers
from support.models import inputs_of, model_of
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import s2ft
from s2ft import Coupling, S2FTConfig
from s2ft.adapter.formats.native import CONFIG
from s2ft.model.towers import tower_of, towers_of, trained_towers

LANGUAGE, VISION, AUDIO, PROJECTOR = "language", "vision", "audio", "projector"
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)

# model type: its class, the towers it has, those trained by default, and the tower of some paths
TYPES = {
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        [LANGUAGE, VISION, PROJECTOR],
        [LANGUAGE],
        {"model.visual.blocks.0.mlp.down_proj": VISION, "model.visual.merger.mlp.0": PROJECTOR, "lm_head": LANGUAGE},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        [LANGUAGE, VISION, PROJECTOR],
        [LANGUAGE],
        {"model.vision_tower.encoder.layers.0.mlp.fc1": VISION, "model.multi_modal_projector": PROJECTOR},
    ),
    "idefics2": (
        "Idefics2ForConditionalGeneration",
        [LANGUAGE, VISION, PROJECTOR],
        [LANGUAGE],
        {"model.connector.perceiver_resampler.layers.0": PROJECTOR, "model.text_model.layers.0.mlp": LANGUAGE},
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        [LANGUAGE, VISION, PROJECTOR],
        [LANGUAGE],
        {"qformer.encoder.layer.0": PROJECTOR, "language_projection": PROJECTOR, "vision_model.encoder": VISION},
    ),
    "git": (
        "GitForCausalLM",
        [LANGUAGE, VISION, PROJECTOR],
        [LANGUAGE],
        {"git.encoder.layer.0.attention": LANGUAGE, "git.image_encoder": VISION, "git.visual_projection": PROJECTOR},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        [LANGUAGE, VISION, PROJECTOR],
        [LANGUAGE],
        {"vision_model.model.layers.0": VISION, "language_model.model.layers.0": LANGUAGE},
    ),
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        [LANGUAGE, VISION, AUDIO, PROJECTOR],
        [LANGUAGE],
        {"model.layers.0.self_attn.qkv_proj": LANGUAGE, "model.embed_tokens_extend.audio_embed.encoder": AUDIO},
    ),
    "qwen2_5_omni_thinker": (
        "Qwen2_5OmniThinkerForConditionalGeneration",
        [LANGUAGE, VISION, AUDIO, PROJECTOR],
        [LANGUAGE],
        {"model.audio_tower.layers.0.fc1": AUDIO, "model.visual.blocks.0.attn": VISION},
    ),
    "granite_speech": (
        "GraniteSpeechForConditionalGeneration",
        [LANGUAGE, AUDIO, PROJECTOR],
        [LANGUAGE],
        {"model.encoder.layers.0.attn": AUDIO, "model.projector": PROJECTOR},
    ),
    "clip": ("CLIPModel", [LANGUAGE, VISION, PROJECTOR], [LANGUAGE, VISION, PROJECTOR], {"text_model": LANGUAGE}),
    "siglip": ("SiglipModel", [LANGUAGE, VISION], [LANGUAGE, VISION], {"vision_model.head.mlp.fc1": VISION}),
    "whisper": (
        "WhisperForConditionalGeneration",
        [LANGUAGE, AUDIO],
        [LANGUAGE, AUDIO],
        {"model.encoder.layers.0.fc1": AUDIO, "model.decoder.layers.0.encoder_attn.k_proj": LANGUAGE},
    ),
    "pix2struct": (
        "Pix2StructForConditionalGeneration",
        [LANGUAGE, VISION],
        [LANGUAGE, VISION],
        {"encoder.encoder.layer.0": VISION, "decoder.layer.0": LANGUAGE},
    ),
    "t5": ("T5ForConditionalGeneration", [LANGUAGE], [LANGUAGE], {"encoder.block.0": LANGUAGE}),
    "vit": ("ViTModel", [VISION], [VISION], {"layers.0.mlp.fc1": VISION}),
    "wav2vec2": ("Wav2Vec2Model", [AUDIO], [AUDIO], {"encoder.layers.0": AUDIO, "feature_projection": AUDIO}),
}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_towers_of_a_type(model_type):
    name, present, trained, paths = TYPES[model_type]
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = AutoConfig.for_model(model_type)
    for one in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        for depth in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "depth"):
            if isinstance(getattr(one, depth, None), int):
                setattr(one, depth, 1)
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(config)
    assert towers_of(model) == present and trained_towers(model, None) == trained
    assert {path: tower_of(model, path) for path in paths} == paths


def llava():
    text = LlamaConfig(**SIZES, vocab_size=40, num_key_value_heads=2)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def couplings():
    language, vision = "model.language_model.layers", "model.vision_tower.encoder.layers"
    found = []
    for i in range(2):
        mlp = {key: f"{language}.{i}.mlp.{key}_proj" for key in ("up", "gate", "down")}
        found.append(Coupling.gated_ffn(i, **mlp, channels=24))
        mlp = {"up": f"{vision}.{i}.mlp.fc1", "down": f"{vision}.{i}.mlp.fc2"}
        found.append(Coupling.ffn(2 + i, **mlp, channels=24))
    projector = {"up": "model.multi_modal_projector.linear_1", "down": "model.multi_modal_projector.linear_2"}
    return [*found, Coupling.ffn(4, **projector, channels=16)]


def inputs():
    ids = torch.tensor([[5, 39, 39, 39, 39, 7, 8]])
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(1, 3, 8, 8)}


CHOICES = {
    "default": (None, [LANGUAGE]),
    "vision": ([VISION], [VISION]),
    "two": ([PROJECTOR, LANGUAGE], [LANGUAGE, PROJECTOR]),
    "all": ([LANGUAGE, VISION, PROJECTOR], [LANGUAGE, VISION, PROJECTOR]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_only_slices_of_the_chosen_towers_are_trained(choice, tmp_path):
    towers, expected = CHOICES[choice]
    model, config = llava(), S2FTConfig(d_ratio=0.25, u_ratio=0.25, towers=towers)
    planned = s2ft.plan(model, config, couplings=couplings())
    selection = s2ft.select(model, config, couplings=couplings())
    report = s2ft.attach(model, config, couplings=couplings(), example=inputs())
    assert planned.trainable == report.trainable and planned.towers == report.towers
    assert [tower for tower, is_trained in report.towers.items() if is_trained] == expected
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{path}.s2" for path in selection.units}
    assert {tower_of(model, name) for name in trained} == set(expected)
    model(**inputs()).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in trained.values())
    s2ft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["config"].get("towers") == towers
    other = llava()
    s2ft.load_adapter(other, tmp_path, trainable=True)
    assert {name for name, p in other.named_parameters() if p.requires_grad} == set(trained)


def test_the_report_says_what_is_frozen():
    report = s2ft.plan(llava(), S2FTConfig(d_ratio=0.25), couplings=couplings())
    assert "towers: language trained; vision, projector frozen (towers= trains them)" in str(report)
    everything = S2FTConfig(d_ratio=0.25, towers=[LANGUAGE, VISION, PROJECTOR])
    assert (
        "towers: language, vision, projector trained\n"
        in str(s2ft.plan(llava(), everything, couplings=couplings())) + "\n"
    )


def test_an_example_of_text_reaches_the_language_model():
    """Couplings of frozen towers are not tried out."""
    example = {"input_ids": torch.tensor([[5, 7, 8]])}
    assert s2ft.attach(llava(), S2FTConfig(d_ratio=0.25), couplings=couplings(), example=example).trainable
    with pytest.raises(ValueError, match="example must reach every coupling"):
        s2ft.attach(llava(), S2FTConfig(d_ratio=0.25, towers=[VISION]), couplings=couplings(), example=example)


BAD = {
    "absent": (dict(towers=[AUDIO]), "towers names audio, which .* does not have: it has language, vision, projector"),
    "no coupling": (
        dict(towers=[VISION, PROJECTOR]),
        "no coupling is in projector, .* has couplings in language, vision",
    ),
    "layer of another tower": (dict(layers=[2]), "layers names .2., but the model has layers 0 to 1"),
}


@pytest.mark.parametrize("bad", BAD)
def test_towers_that_can_not_be_trained(bad):
    options, message = BAD[bad]
    model = llava()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = couplings()[:-1] if bad == "no coupling" else couplings()
    with pytest.raises(ValueError, match=message):
        s2ft.attach(model, S2FTConfig(d_ratio=0.25, **options), couplings=given, verify=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("towers", ["vision", [], ["sight"], [VISION, VISION], [1]])
def test_towers_are_a_list_of_known_names(towers):
    with pytest.raises(
        ValueError, match="towers must be a list of different names of language, vision, audio, projector"
    ):
        S2FTConfig(d_ratio=0.1, towers=towers)


def test_units_by_name_and_towers_exclude_each_other():
    with pytest.raises(ValueError, match="nothing is left for towers to choose"):
        S2FTConfig(units={"model.vision_tower.encoder.layers.0.mlp.fc2": [1]}, towers=[VISION])
    model, config = llava(), S2FTConfig(units={"model.vision_tower.encoder.layers.0.mlp.fc2": [1]})
    assert s2ft.attach(model, config, couplings=couplings(), verify=False).towers[VISION]


def test_models_without_a_language_model_beside_others_are_trained_whole():
    for case in ("clip", "whisper", "t5", "llama"):
        model = model_of(case)
        everything = s2ft.plan(model, S2FTConfig(d_ratio=0.25))
        names = S2FTConfig(d_ratio=0.25, towers=[t for t in towers_of(model) if t != PROJECTOR])
        assert everything.trainable == s2ft.plan(model, names).trainable


def test_one_side_of_an_encoder_decoder():
    model = model_of("whisper")
    report = s2ft.attach(model, S2FTConfig(d_ratio=0.25, towers=[LANGUAGE]))
    assert report.towers == {LANGUAGE: True, AUDIO: False}
    model(**inputs_of(model)).logits.sum().backward()
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None} == {"decoder"}


def test_the_estimate_counts_the_chosen_towers():
    options = dict(example=inputs(), couplings=couplings(), optimizer="sgd")
    for towers in (None, [VISION]):
        config = S2FTConfig(d_ratio=0.25, towers=towers)
        assert (
            s2ft.estimate(llava(), config, **options).trained
            == s2ft.plan(llava(), config, couplings=couplings()).trainable
        )


def test_names_tell_the_towers_of_a_model_of_ones_own():
    model = nn.ModuleDict({"vision_encoder": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "text": nn.Linear(4, 4)})
    alone = [Coupling.one_sided(i, path=f"vision_encoder.{i}", count=(4, 8)[i]) for i in range(2)]
    alone.append(Coupling.one_sided(2, path="text", count=4))
    assert s2ft.plan(model, S2FTConfig(l_ratio=0.5), couplings=alone).towers == {LANGUAGE: True, VISION: True}
    report = s2ft.plan(model, S2FTConfig(l_ratio=0.5, towers=[VISION]), couplings=alone)
    assert report.towers == {LANGUAGE: False, VISION: True}


def test_discovered_couplings_leave_modules_to_save_alone(tmp_path):
    """A projector that is trained in full is in no coupling, and the report counts the weights of the blocks."""
    model = llava()
    config = S2FTConfig(d_ratio=0.25, modules_to_save=["multi_modal_projector"])
    planned, report = s2ft.plan(model, config), s2ft.attach(model, config)
    assert report.towers == {LANGUAGE: True, VISION: False, PROJECTOR: True} and report.weights == planned.weights
    assert sum(report.weights.values()) == 28 - 2 and "weights of the blocks: " in str(report)
    model(**inputs()).loss.backward()
    s2ft.save_adapter(model, tmp_path)
    other = llava()
    s2ft.load_adapter(other, tmp_path)
    assert not [n for n in s2ft.read_adapter(tmp_path).couplings if "projector" in str(n)]


def test_calibration_with_images_and_padding():
    """The mask of the tokens is not applied to patches, of which there may be as many."""
    model, batch = llava(), inputs()
    del batch["labels"]
    images = torch.cat([batch["pixel_values"]] * 2)
    ids = torch.tensor([[39, 39, 39, 39], [39, 39, 39, 39]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    config = S2FTConfig(u_ratio=0.25, d_ratio=0.25, towers=[LANGUAGE, PROJECTOR, VISION], selection="activation")
    padded = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    chosen = [
        s2ft.select(model, config, [{**padded, **change}], couplings=couplings())
        for change in ({}, {"attention_mask": torch.ones_like(mask)})
    ]
    outside = [name for name in chosen[0].units if tower_of(model, name) != LANGUAGE]
    assert len(outside) == 6 and all(torch.equal(chosen[0][name], chosen[1][name]) for name in outside)
