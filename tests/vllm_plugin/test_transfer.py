"""Slice sync inside vLLM's LLM: each scenario of support/vllm_transfer.py in a process of its own."""

import pytest
import torch
from support.vllm_models import save_adapters
from support.vllm_transfer import run
from transformers import MixtralConfig, MixtralForCausalLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


# words of a scenario, and variables
SCENARIOS = [
    ("exact float32", {}),
    ("exact bfloat16", {}),
    ("exact float32 2", TWO),  # with tensor parallelism
    ("exact bfloat16 2", TWO),
    ("exact float32 1 lora", {}),
    ("bad_input", {}),
    ("packed", {"VLLM_PLUGINS": "none"}),
    ("not_chosen", {}),
    ("dropped", {}),
    ("paused", {}),
]


@pytest.mark.parametrize("words, variables", SCENARIOS)
def test_a_scenario(served, tmp_path, words, variables):
    scenario, *more = words.split()
    run(scenario, served, tmp_path, *more, **variables)


def test_experts_that_the_processor_packs(tmp_path):
    shape = dict(vocab_size=512, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256)
    torch.manual_seed(2)
    model = MixtralForCausalLM(config).float().eval()
    adapters = {"experts": dict(d_ratio=0.1), "attention": dict(o_ratio=0.25, v_ratio=0.5)}
    run("experts", save_adapters(model, tmp_path / "mixtral", adapters, scale=0.1), tmp_path)
