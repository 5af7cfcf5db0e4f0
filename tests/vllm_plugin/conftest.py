"""Bases with adapters for the tests of the vLLM plugin."""

import pytest
from support.vllm_models import save_adapters, tiny_llama


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A tiny LLaMA with three adapters and the answers of each, see support/vllm_models.py."""
    return save_adapters(tiny_llama(), tmp_path_factory.mktemp("served"))
