"""Random selection over all layers together, as in the paper's code, and the draws of each layer alone."""

import pytest
import torch
from support.inside import couplings_of, select_units as select
from support.models import model_of
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft
from s2ft import S2FTConfig

MODEL = model_of("llama")
DOWN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]  # 52 channels each


def units(seed, ratio=0.1, **options):
    found = select(
        couplings_of(MODEL), S2FTConfig(d_ratio=ratio, seed=seed, allocation="global", **options), MODEL
    ).units
    return [(layer, unit) for layer, path in enumerate(DOWN) for unit in found.get(path, torch.tensor([])).tolist()]


def test_the_number_is_a_share_of_all_units_rounded_down():
    assert len(units(0, 0.1)) == 15 and len(units(0, 0.02)) == 3 and len(units(0, 1.0)) == 156
    assert len(units(0, 0.0129)) == 2  # 2.01 of 156, less than one in each layer
    with pytest.raises(ValueError, match="d_ratio=0.006 selects none of the 156 channels of all layers; the smallest"):
        units(0, 0.006)
    assert len(units(0, 0.5, budget=24 * 7)) == 7
    assert len(units(0, float(f"{(1 / 156) + 1e-6:.6f}"))) == 1


def test_the_number_of_parameters_is_that_of_the_reference_code():
    """LLaMA-2-7B with the ratios of the paper's measurements: int(32 * 32 * 0.026) heads and int(32 * 11008 * 0.01)
    channels, of v, o and of up, down. The reference counts 56,115,200."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    ratios = S2FTConfig(v_ratio=0.026, o_ratio=0.026, u_ratio=0.01, d_ratio=0.01, allocation="global")
    heads, channels = int(32 * 32 * 0.026), int(32 * 11008 * 0.01)
    assert s2ft.plan(model, ratios).trainable == 2 * 4096 * (128 * heads + channels) == 56_115_200


def test_every_unit_of_every_layer_is_as_likely():
    """Over many seeds each of the 156 units is drawn as often as binomial counts allow, and layers get unequal shares."""
    draws, ratio = 400, 0.1
    counts, shares = torch.zeros(3, 52), set()
    for seed in range(draws):
        found = units(seed, ratio)
        assert len(set(found)) == 15
        shares.add(tuple(sum(layer == one for layer, _ in found) for one in range(3)))
        for layer, unit in found:
            counts[layer, unit] += 1
    expected, deviation = draws * 15 / 156, (draws * 15 / 156 * 141 / 156) ** 0.5
    assert float((counts - expected).abs().max()) < 4.5 * deviation
    assert float((counts.sum(1) - draws * 5).abs().max()) < 4.5 * (draws * 15 * 2 / 9) ** 0.5
    assert len(shares) > 20
