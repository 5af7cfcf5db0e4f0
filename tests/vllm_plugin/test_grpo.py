"""GRPO whose answers vLLM samples: trainer and engine agree on them as well as they do on the base."""

import json

import pytest
from support.vllm_rl import run, save_base

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainer_and_engine_agree_after_each_update(dtype, tmp_path):
    folder = save_base(tmp_path / "base", dtype)
    found = run("agreement", folder, dtype)
    assert found["steps"] == [0, 1, 2] and found["trained"]["tokens"] == found["base"]["tokens"]
    # weights that were not sent show: see "stale"
    for name in ("mean", "quantile"):
        assert found["trained"][name] <= 1.5 * found["base"][name], json.dumps(found)
    assert found["stale"]["mean"] > 20 * found["last"]["mean"], json.dumps(found)
