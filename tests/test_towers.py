"""Towers: which part of a model is trained where it takes images or sound besides text."""

import pytest
import torch
import transformers
from support.inside import tower_of, towers_of, trained_towers
from support.nets import seeded
from support.states import with_loaded
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import s2ft
from s2ft import Coupling, S2FTConfig

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
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1)
    return seeded(LlavaForConditionalGeneration, config)


def couplings():
    language, vision = "model.language_model.layers", "model.vision_tower.encoder.layers"
    found = []
    for i in range(2):
        mlp = {key: f"{language}.{i}.mlp.{key}_proj" for key in ("up", "gate", "down")}
        found.append(Coupling.gated_ffn(i, **mlp, channels=24))
        found.append(Coupling.ffn(2 + i, up=f"{vision}.{i}.mlp.fc1", down=f"{vision}.{i}.mlp.fc2", channels=24))
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
    report = s2ft.attach(model, config, couplings=couplings(), example=inputs())
    assert planned.trainable == report.trainable and planned.towers == report.towers
    assert [tower for tower, is_trained in report.towers.items() if is_trained] == expected
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {tower_of(model, name) for name in trained} == set(expected)
    model(**inputs()).loss.backward()
    assert all(bool(parameter.grad.any()) for parameter in trained.values())
    s2ft.save_adapter(model, tmp_path)
    other = with_loaded(llava(), tmp_path, trainable=True)
    assert {name for name, p in other.named_parameters() if p.requires_grad} == set(trained)


def test_a_tower_is_trained_on_top_of_another():
    model = llava()
    for tower in (VISION, LANGUAGE):
        s2ft.attach(
            model,
            S2FTConfig(d_ratio=0.25, towers=[tower]),
            name=tower,
            couplings=couplings(),
            example=inputs(),
            on_top=True,
        )
        s2ft.freeze_adapter(model)
    assert s2ft.status(model).active == {VISION: 1.0, LANGUAGE: 1.0}


def test_an_example_of_text_reaches_the_language_model():
    """Couplings of frozen towers are not tried out."""
    example = {"input_ids": torch.tensor([[5, 7, 8]])}
    assert s2ft.attach(llava(), S2FTConfig(d_ratio=0.25), couplings=couplings(), example=example).trainable
    with pytest.raises(ValueError, match="example must reach every coupling"):
        s2ft.attach(llava(), S2FTConfig(d_ratio=0.25, towers=[VISION]), couplings=couplings(), example=example)


def test_names_tell_the_towers_of_a_model_of_ones_own():
    model = nn.ModuleDict({"vision_encoder": nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), "text": nn.Linear(4, 4)})
    alone = [Coupling.one_sided(i, path=f"vision_encoder.{i}", count=(4, 8)[i]) for i in range(2)]
    alone.append(Coupling.one_sided(2, path="text", count=4))
    assert s2ft.plan(model, S2FTConfig(l_ratio=0.5), couplings=alone).towers == {LANGUAGE: True, VISION: True}
    report = s2ft.plan(model, S2FTConfig(l_ratio=0.5, towers=[VISION]), couplings=alone)
    assert report.towers == {LANGUAGE: False, VISION: True}


@pytest.mark.parametrize("found_by", ["family", "declaration", "trials"])
def test_a_frozen_projector_can_be_trained_in_full(found_by, tmp_path, monkeypatch):
    """It is then in no coupling. The adapter has the couplings that are left."""
    from support.inside import registry

    for types in (registry.FAMILIES, registry._REGISTERED) if found_by != "family" else ():
        monkeypatch.delitem(types, "llava", raising=False)
    if found_by == "declaration":
        monkeypatch.setitem(registry._REGISTERED, "llava", lambda model: couplings())
    model, config = llava(), S2FTConfig(d_ratio=0.25, modules_to_save=["multi_modal_projector"])
    planned, report = s2ft.plan(model, config), s2ft.attach(model, config)
    assert report.towers == {LANGUAGE: True, VISION: False, PROJECTOR: True} and report.weights == planned.weights
    assert bool(report.weights) == (found_by == "trials")
    model(**inputs()).loss.backward()
    s2ft.save_adapter(model, tmp_path)
    saved = s2ft.read_adapter(tmp_path)
    assert saved.couplings and not [one for one in saved.couplings if "projector" in str(one)]
    assert len(saved.extra_weights) == 4
    assert set(s2ft.merge(with_loaded(llava(), tmp_path)).state_dict()) == set(llava().state_dict())
    if found_by != "trials":
        with pytest.raises(ValueError, match="as slices"):
            s2ft.plan(llava(), S2FTConfig(d_ratio=0.25, modules_to_save=["mlp"]))


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


VISION_UNITS = {"model.vision_tower.encoder.layers.0.mlp.fc2": [1]}
REFUSED = [  # config, how many couplings are given, key words
    *((dict(towers=towers), 5, "towers") for towers in (["vision", "vision"], ["sight"], "vision", [], [1])),
    (dict(towers=[AUDIO]), 5, "audio.*language, vision, projector"),
    (dict(towers=[VISION, PROJECTOR]), 4, "projector"),
    (dict(layers=[2]), 5, "layers"),
    (dict(units=VISION_UNITS, d_ratio=0.0, towers=[VISION]), 5, "towers"),
]


@pytest.mark.parametrize("options, count, words", REFUSED)
def test_what_is_refused_changes_nothing(options, count, words):
    model = llava()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        s2ft.attach(model, S2FTConfig(**{"d_ratio": 0.25, **options}), couplings=couplings()[:count], verify=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_units_by_name_choose_their_tower():
    assert s2ft.attach(llava(), S2FTConfig(units=VISION_UNITS), couplings=couplings(), verify=False).towers[VISION]


PEFT_CHOICES = {
    "default": (None, {LANGUAGE}),
    "vision": ([VISION], {VISION}),
    "all": ([LANGUAGE, VISION], {LANGUAGE, VISION}),
}


@pytest.mark.parametrize("choice", PEFT_CHOICES)
def test_the_peft_method_trains_the_same_towers(choice, monkeypatch):
    import peft
    from support.inside import registry

    from s2ft.peft import S2FTPeftConfig

    monkeypatch.setitem(registry._REGISTERED, "llava", lambda model: couplings())
    towers, expected = PEFT_CHOICES[choice]
    base = llava()
    report = s2ft.plan(base, S2FTConfig(d_ratio=0.25, towers=towers))
    model = peft.get_peft_model(base, S2FTPeftConfig(d_ratio=0.25, towers=towers))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {tower_of(model.get_base_model(), name.removeprefix("base_model.model.")) for name in trained} == expected
    assert model.get_nb_trainable_parameters()[0] == report.trainable
    for wrong in (dict(d_ratio=0.25, towers=[AUDIO]), dict(target_modules=["fc2"], ratio=0.25, towers=[VISION])):
        with pytest.raises(ValueError, match="towers"):
            peft.get_peft_model(llava(), S2FTPeftConfig(**wrong))
