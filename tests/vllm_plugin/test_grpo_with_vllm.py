"""The example of GRPO whose answers vLLM samples: trainer and engine agree on their log-probabilities."""

import os
import subprocess
import sys

import pytest
from support.vllm_rl import save_base
from support.vllm_transfer import OFFLINE, ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_example_samples_by_vllm(tmp_path):
    folder = save_base(tmp_path / "base")
    command = [sys.executable, ROOT / "examples" / "grpo_with_trl.py", "--model", folder, "--use-vllm"]
    variables = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("log-probabilities apart by at most: ")]
    apart = [float(number) for number in line.partition(": ")[2].split()]
    assert len(apart) == 2 and max(apart) < 1e-4
