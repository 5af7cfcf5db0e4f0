"""Twins: tiny configs keep the structure of a model, and tiny models hide nothing."""

import pytest
import torch
from support.inside import (
    HEADS,
    discover,
    kinds_of_blocks,
    paths_and_classes,
    run_example,
    runnable_example,
    tensors_in,
    tiny_config,
    trial_of,
    twins_of,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3Config,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3NextConfig,
    SwinConfig,
    ViTConfig,
    WhisperConfig,
)

import s2ft

LLAMA_8B = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)


def on_meta(config, kind=AutoModelForCausalLM):
    with torch.device("meta"):
        return kind.from_config(config)


def twin_of(model):
    return next(twins_of(model, []))


class Interrupted(nn.Sequential):
    """A model whose third forward is interrupted, as by Ctrl-C in a notebook."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().forward(x)


def test_an_interrupt_of_the_search_leaves_no_float64():
    model = Interrupted(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    with pytest.raises(KeyboardInterrupt):
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1), example=torch.randn(2, 16))
    made = torch.zeros(1, dtype=torch.float32), torch.zeros(1).float()
    assert [torch.get_default_dtype(), *(one.dtype for one in made)] == [torch.float32] * 3


# ---- configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, small", [(32, HEADS), (8, HEADS // 2), (1, 1)])
def test_grouped_queries_stay_grouped(heads, small):
    config = LlamaConfig(**{**LLAMA_8B, "num_key_value_heads": heads})
    assert tiny_config(config).num_key_value_heads == small and config.num_key_value_heads == heads


def test_tokens_are_inside_the_vocabulary_and_different():
    config = tiny_config(Qwen2_5_VLConfig())
    tokens = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    assert len(set(tokens)) == 3 and max(tokens) < config.text_config.vocab_size <= 256


def test_sections_of_position_embeddings_fill_the_small_heads():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = tiny_config(Qwen2_5_VLConfig(text_config={"rope_parameters": rope})).text_config
    assert sum(text.rope_parameters["mrope_section"]) == text.hidden_size // text.num_attention_heads // 2


def test_images_and_the_tokens_for_them_shrink_together():
    config = tiny_config(Gemma3Config(vision_config={"image_size": 896, "patch_size": 14}))
    assert ((config.vision_config.image_size // config.vision_config.patch_size), config.mm_tokens_per_image) == (8, 4)


# ---- twins ------------------------------------------------------------------------------------------------

STRUCTURES = {
    "llama": LlamaConfig(**LLAMA_8B),
    "one key/value head": FalconConfig(),
    "experts": MixtralConfig(),
    "experts with biases": GptOssConfig(),
    "latent attention": DeepseekV3Config(num_hidden_layers=8),
    "linear attention": Qwen3NextConfig(num_hidden_layers=8),
    "state space": MambaConfig(num_hidden_layers=4),
    "layers by a period": JambaConfig(num_hidden_layers=16),
    "decoder alone": BartConfig(is_decoder=True),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_twin_has_the_modules_of_the_model_and_runs(name):
    model = on_meta(STRUCTURES[name])
    twin = twin_of(model)
    assert paths_and_classes(twin) == paths_and_classes(model) and kinds_of_blocks(twin) == kinds_of_blocks(model)
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float64}
    assert sum(parameter.numel() for parameter in twin.parameters()) < 2e6
    runnable_example(twin)


def test_the_example_of_a_model_with_images_reaches_both_towers():
    trial = trial_of(on_meta(LlavaConfig(), AutoModelForImageTextToText))
    assert "pixel_values" in trial.example
    for tower in ("language_model.layers.0.mlp.down_proj", "vision_tower.encoder.layers.0.mlp.fc2"):
        assert any(path.endswith(tower) for path in trial.called), tower


@pytest.mark.parametrize("config", [ViTConfig(), SwinConfig(), WhisperConfig()], ids=lambda config: config.model_type)
def test_a_twin_of_images_or_sound_runs(config):
    kinds = {"vit": "ViTForImageClassification", "swin": "SwinForImageClassification"}
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, kinds.get(config.model_type, "WhisperForConditionalGeneration"))(config)
    runnable_example(twin_of(model))


def test_nothing_in_a_twin_is_special():
    for name, parameter in twin_of(on_meta(LlamaConfig(**LLAMA_8B, attention_bias=True))).named_parameters():
        assert float(parameter.detach().std()) > 1e-3, name
        if "norm" in name:
            assert bool((parameter != 1).all()), name


@torch.no_grad()
def test_a_twin_computes_in_float64_where_the_model_asks_for_float32():
    """Norms convert to float32. On the twin, its rounding must not hide a small change."""
    twin = twin_of(on_meta(LlamaConfig(**LLAMA_8B)))
    example = runnable_example(twin)
    norm = dict(twin.named_modules())["model.layers.0.input_layernorm"]
    found = []
    norm.register_forward_hook(lambda module, args, output: found.append(output))
    before = next(tensors_in(run_example(twin, example)))
    twin.model.embed_tokens.weight *= 1 + 1e-13
    after = next(tensors_in(run_example(twin, example)))
    assert found[0].dtype == torch.float64 and before.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32 and 0 < float((after - before).abs().max()) < 1e-10


def test_a_small_model_is_copied_and_stays_as_it_is():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert twin_of(model).config.hidden_size == 32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.bfloat16 and not model._forward_hooks


def test_a_model_that_differs_from_its_config_is_copied():
    small = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, vocab_size=4096)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA_8B, **small}))
    model.model.layers[0].mlp = nn.Linear(256, 256)
    assert isinstance(twin_of(model).model.layers[0].mlp, nn.Linear)


def test_too_large_a_model_that_no_config_builds_is_refused_with_what_was_tried():
    class Broken(PretrainedConfig):
        model_type = "broken"

        def to_dict(self):
            raise RuntimeError("no dict of this one")

    model = on_meta(LlamaConfig(**LLAMA_8B))
    model.config = Broken()
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: no small copy.*no dict of this one.*too many"):
        trial_of(model)


# ---- examples ---------------------------------------------------------------------------------------------


def test_an_output_with_nan_is_refused():
    twin = twin_of(on_meta(LlamaConfig(**LLAMA_8B)))
    twin.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        runnable_example(twin)


# ---- all types --------------------------------------------------------------------------------------------


def test_layers_with_one_weight_are_left_out():
    model = nn.Sequential()
    model.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)))
    model.blocks[1][0].weight = model.blocks[0][0].weight
    found = discover(model, torch.randn(2, 8))
    trained = {projection.path for one in found.couplings for projection in one.projections}
    assert not trained & {"blocks.0.0", "blocks.1.0"} and {"blocks.2.0", "blocks.2.2"} <= trained
    assert [row.reason for row in found.weights if row.path == "blocks.1.0"] == ["one weight with that of blocks.0.0"]


def test_a_model_may_be_a_list_of_blocks_itself():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)))
    found = discover(model, torch.randn(2, 8))
    assert [one.layer for one in found.couplings] == [0, 1, 2]
    assert [one.consumer.path for one in found.couplings] == ["0.2", "1.2", "2.2"]
