"""GRPO whose answers vLLM samples: trainer and engine agree on them as well as they do on the base."""

import json
import os
import subprocess
import sys

import pytest
from support.vllm_rl import ROOT, run, save_base
from support.vllm_transfer import OFFLINE

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


def test_the_example_samples_by_vllm(tmp_path):
    folder = save_base(tmp_path / "base")
    command = [sys.executable, ROOT / "examples" / "grpo_with_trl.py", "--model", folder, "--use-vllm"]
    variables = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("log-probabilities apart by at most: ")]
    apart = [float(number) for number in line.partition(": ")[2].split()]
    assert len(apart) == 2 and max(apart) < 1e-4
