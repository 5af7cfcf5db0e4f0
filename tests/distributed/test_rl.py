"""s2ft dpo and s2ft grpo under torchrun: two processes train the adapter of one, and a resumed run is exact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tolerances import GEMM
from train.tiny import save_tiny, write_jsonl

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REWARD = "def short(completions, **_):\n    return [-len(text[0]['content']) / 10 for text in completions]\n"
COMMON = ["--model", "model", "--max-steps", "4", "--batch-size", "8", "--lr", "0.01", "--save-steps", "2"]
DPO = ["dpo", "--data", "pairs.jsonl", *COMMON]
GRPO = ["grpo", "--data", "tasks.jsonl", "--rewards", "mine.py:short", "--beta", "0.1", "--num-generations", "4",
        "--max-completion-length", "8", *COMMON]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("rl")
    save_tiny(work / "model")
    pairs = [{"question": f"{a}+1=", "chosen": str(a + 1), "rejected": "no idea"} for a in range(16)]
    write_jsonl(work / "pairs.jsonl", pairs)
    write_jsonl(work / "tasks.jsonl", [{"question": f"{a}+1="} for a in range(8)])
    (work / "mine.py").write_text(REWARD)
    return work


def run(work, ranks, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "s2ft", *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def adapter(work, output):
    return load_file(work / output / "adapter" / "s2ft_adapter.safetensors")


def test_two_processes_train_the_adapter_of_one_on_preferences(work):
    run(work, 1, *DPO, "--output", "one")
    run(work, 2, *DPO, "--output", "two")
    one, two = adapter(work, "one"), adapter(work, "two")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=GEMM[torch.float32][0], atol=GEMM[torch.float32][1])


def test_a_resumed_run_of_two_processes_generates_the_same_answers(work):
    run(work, 2, *GRPO, "--output", "whole")
    run(work, 2, *GRPO, "--output", "half", "--stop-after", "2")
    run(work, 2, *GRPO, "--output", "half", "--resume")
    whole, half = adapter(work, "whole"), adapter(work, "half")
    assert whole.keys() == half.keys() and all(torch.equal(whole[name], half[name]) for name in whole)
