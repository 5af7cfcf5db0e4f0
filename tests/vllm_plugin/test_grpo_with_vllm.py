"""The example of GRPO whose answers vLLM samples: trainer and engine agree on their log-probabilities."""

import pytest
from support.vllm_rl import save_base
from support.vllm_transfer import ROOT, run_program

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_example_samples_by_vllm(tmp_path, monkeypatch):
    folder = save_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    printed = run_program(ROOT / "examples" / "grpo_with_trl.py", "--model", folder, "--use-vllm")
    (line,) = [line for line in printed.splitlines() if line.startswith("log-probabilities apart by at most: ")]
    apart = [float(number) for number in line.partition(": ")[2].split()]
    assert len(apart) == 2 and max(apart) < 1e-4
