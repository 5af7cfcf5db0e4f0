"""Commands for which memory is too small end with one error that says what to change, and not with a traceback."""

from types import SimpleNamespace

import pytest
import torch
from train.tiny import save_tiny, sums, write_jsonl

from s2ft.cli.main import main
from s2ft.estimation.result import size

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB.")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model")
    write_jsonl(work / "data.jsonl", sums(16))
    return work


def fails_at(step):
    """A step of training that fails as if memory were too small, from this one on."""
    from s2ft.train.runs import SFTRunTrainer

    plain = SFTRunTrainer.training_step

    def training_step(self, *args, **options):
        if self.state.global_step >= step:
            raise GPU
        return plain(self, *args, **options)

    return training_step


def stored(count, step):
    """Instead of an estimate: bytes that grow with the tokens, and that checkpointing halves."""
    return SimpleNamespace(peak=step.batch * step.length * 10_000 // (1 + step.gradient_checkpointing))


def test_training(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("s2ft.train.remedies.Count.estimate", stored)
    monkeypatch.setattr("s2ft.train.runs.SFTRunTrainer.training_step", fails_at(1))
    options = ["--batch-size", "4", "--max-steps", "3", "--save-steps", "1", "--max-length", "200"]
    command = ["sft", "--model", work / "model", "--data", work / "data.jsonl", "--output", tmp_path / "run", *options]
    assert main([str(word) for word in command]) == 1
    printed = capsys.readouterr().err
    error = printed[printed.index("s2ft sft: error: ") :].splitlines()
    assert error[0] == "s2ft sft: error: out of memory on cpu: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert error[1].startswith("a step of 4 × ") and "by s2ft's estimate" in error[1]
    assert any("--gradient-checkpointing" in line and line.endswith("costs time") for line in error), error
    assert "checkpoint-1 is kept" in error[-1] and "Traceback" not in printed


def test_training_on_pairs(work, tmp_path, monkeypatch, capsys):
    def fails(self, *args, **options):
        raise GPU

    monkeypatch.setattr("s2ft.train.remedies.Count.estimate", stored)
    monkeypatch.setattr("s2ft.train.rl_trainers.DPORunTrainer.training_step", fails)
    rows = [{"prompt": f"{number}+1=", "chosen": str(number + 1), "rejected": "no"} for number in range(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    command = ["dpo", "--model", work / "model", "--data", data, "--output", tmp_path / "run", "--batch-size", 4]
    assert main([str(word) for word in command]) == 1
    printed = capsys.readouterr().err
    assert "s2ft dpo: error: out of memory on cpu: CUDA out of memory" in printed and "Traceback" not in printed
    assert "tokens × 2 takes" in printed and "--per-device-train-batch-size 2" in printed
    assert "no checkpoint was written" in printed


@pytest.mark.parametrize("command", ("generate", "eval"))
def test_answers(command, work, monkeypatch, capsys):
    def fails(*args, **options):
        raise GPU

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fails)
    options = {"generate": ["--prompt", "2+3="], "eval": ["--data", work / "data.jsonl", "--task", "arithmetic"]}
    words = [command, "--model", work / "model", "--max-new-tokens", 64, *options[command]]
    assert main([str(word) for word in words]) == 1
    printed = capsys.readouterr().err
    error = printed[printed.index(f"s2ft {command}: error: ") :].splitlines()
    cache = 2 * 2 * 2 * 8 * 64 * 4  # keys and values of 2 layers, 2 heads of 8 numbers, 64 tokens, 4 bytes
    answers = {"generate": 1, "eval": 32}[command]
    assert error[0].endswith("error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert f"of 64 tokens {size(cache * answers)}" in error[1] and "are there for both" in error[1]
    assert any("--dtype bfloat16" in line for line in error)
    assert f"  --max-new-tokens 32: {size(cache * answers // 2)} of keys and values" in error
    assert (f"  --batch-size 8: {size(cache * 8)} of keys and values" in error) == (command == "eval")


@pytest.mark.parametrize("command", ("merge", "export"))
def test_a_command_that_counts_nothing_names_a_switch(command, monkeypatch, capsys):
    def run(arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(f"s2ft.cli.{command}.run", run)
    assert main([command]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"s2ft {command}: error: out of memory: no room" and "--dtype" in second
