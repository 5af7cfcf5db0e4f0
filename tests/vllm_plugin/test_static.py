"""Adapters named on the command line of `vllm serve`."""

import pytest
from support.vllm_models import PROMPTS
from support.vllm_server import vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_base_answers_as_in_transformers(served, tmp_path):
    with vllm_server(served.base, tmp_path / "log") as server:
        assert server.answers(["base"], PROMPTS)["base"] == served.answers["base"]
