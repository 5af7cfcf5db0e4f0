"""Slice sync inside vLLM's LLM: each scenario of support/vllm_transfer.py in a process of its own."""

import pytest
import torch
from support.vllm_models import save_adapters
from support.vllm_transfer import run
from transformers import MixtralConfig, MixtralForCausalLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_tensors_are_the_merged_ones_and_the_base_returns(served, tmp_path, dtype):
    run("exact", served, tmp_path, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_tensor_parallelism(served, tmp_path, dtype):
    run("exact", served, tmp_path, dtype, 2, **TWO)


def test_beside_lora(served, tmp_path):
    run("exact", served, tmp_path, "float32", 1, "lora")


def test_bad_input_is_refused_and_the_weights_are_as_before(served, tmp_path):
    run("bad_input", served, tmp_path)


def test_packed_weights_are_refused(served, tmp_path):
    run("packed", served, tmp_path, VLLM_PLUGINS="none")


def test_experts_that_the_processor_packs(tmp_path):
    shape = dict(vocab_size=512, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=256)
    torch.manual_seed(2)
    model = MixtralForCausalLM(config).float().eval()
    adapters = {"experts": dict(d_ratio=0.1), "attention": dict(o_ratio=0.25, v_ratio=0.5)}
    run("experts", save_adapters(model, tmp_path / "mixtral", adapters, scale=0.1), tmp_path)


def test_an_engine_without_the_backend_packs_as_ever(served, tmp_path):
    run("not_chosen", served, tmp_path)


def test_weights_that_were_dropped(served, tmp_path):
    run("dropped", served, tmp_path)


def test_requests_in_the_middle_of_their_answers(served, tmp_path):
    run("paused", served, tmp_path)
