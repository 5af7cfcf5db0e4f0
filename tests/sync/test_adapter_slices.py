"""An adapter as slices of the tensors of a checkpoint: added to the base's files they are the merged model's files."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

import s2ft
from s2ft.model.delta import Delta
from s2ft.ops import effective_units
from s2ft.sync.adapters import adapter_slices

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MODELS = {
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=True), dict(d_ratio=0.1, v_ratio=0.5)),
    "qwen2": (Qwen2Config(**SMALL, num_key_value_heads=2), dict(u_ratio=0.1, g_ratio=0.1, q_ratio=0.25, o_ratio=0.25)),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        dict(d_ratio=0.1, q_ratio=0.25, v_ratio=0.25, o_ratio=0.25),
    ),
    "mixtral": (
        MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3),
        dict(d_ratio=0.1, u_ratio=0.1, o_ratio=0.25),
    ),
}


def trained(kind, dtype=torch.float32):
    config, ratios = MODELS[kind]
    model = AutoModelForCausalLM.from_config(deepcopy(config)).to(dtype)
    base = deepcopy(model)
    s2ft.attach(model, s2ft.S2FTConfig(**ratios))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return base, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_slices_added_to_the_files_are_the_merged_files(kind, dtype, tmp_path):
    base, model = trained(kind, dtype)
    adapter = s2ft.get_adapter(model, "default")
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(deepcopy(MODELS[kind][0]))
    slices = adapter_slices(adapter, hollow)
    base.save_pretrained(tmp_path / "base")
    s2ft.merge(model).save_pretrained(tmp_path / "merged")
    stored, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    for number, spec in enumerate(slices.specs):
        tensor = stored[spec.name]
        assert tuple(tensor.shape) == spec.shape
        now = tensor.index_select(spec.dim, spec.index)
        tensor.index_copy_(spec.dim, spec.index, effective_units(now, slices.deltas[number]))
    assert all(torch.equal(stored[name], merged[name]) for name in merged)


def test_weights_in_full():
    base, model = trained("llama")
    adapter = s2ft.get_adapter(model, "default")
    adapter.extra_weights["model.norm.weight"] = torch.randn(32)
    slices = adapter_slices(adapter, base)
    assert slices.specs[-1].name == "model.norm.weight" and slices.specs[-1].index.numel() == 32
    assert torch.equal(slices.wholes[len(slices.specs) - 1], adapter.extra_weights["model.norm.weight"])


def test_an_adapter_of_another_model():
    base, model = trained("llama")
    adapter = s2ft.get_adapter(model, "default")
    other = LlamaConfig(**{**SMALL, "intermediate_size": 24}, num_key_value_heads=2)
    with torch.device("meta"), pytest.raises(ValueError, match="L0.d|down_proj|values of shape"):
        adapter_slices(adapter, AutoModelForCausalLM.from_config(other))
    name, delta = next(iter(adapter.deltas.items()))
    adapter.deltas = {name.replace("0", "7", 1): Delta(delta.dim, delta.index, delta.values)}
    with pytest.raises(ValueError, match="which LlamaForCausalLM does not have"):
        adapter_slices(adapter, base)
