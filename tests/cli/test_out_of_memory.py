"""Commands for which memory is too small end with one error that says what to change, and not with a traceback."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from support.commands import files_of, s2ft_command
from support.inside import explain_out_of_memory, is_out_of_memory, smaller_step, words_of_allocator

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB.")
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99 bytes. Error code 12 (Cannot allocate memory)"
)


def fails_at(step):
    """A step of training that fails as if memory were too small, from this one on."""
    from support.inside import SFTRunTrainer

    plain = SFTRunTrainer.training_step

    def training_step(self, *args, **options):
        if self.state.global_step >= step:
            raise GPU
        return plain(self, *args, **options)

    return training_step


def test_training(work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("s2ft.train.trainers.SFTRunTrainer.training_step", fails_at(1))
    options = "--batch-size 4 --max-steps 3 --save-steps 1 --max-length 200"
    assert s2ft_command("sft", *files_of(work, tmp_path / "run"), *options.split()) == 1
    printed = capsys.readouterr().err
    error = printed[printed.index("s2ft sft: error: ") :].splitlines()
    assert error[0].startswith("s2ft sft: error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; ")
    assert "iB are free on cpu; --gradient-checkpointing needs less" in error[0]
    assert "checkpoint-1 is kept" in error[1] and len(error) == 2 and "Traceback" not in printed


@pytest.mark.parametrize("command, switch", (("generate", "--dtype bfloat16"), ("eval", "--batch-size 8")))
def test_answers(command, switch, work, monkeypatch, capsys):
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", Mock(side_effect=GPU))
    options = {"generate": ["--prompt", "2+3="], "eval": ["--data", work / "data.jsonl", "--task", "arithmetic"]}
    assert s2ft_command(command, "--model", work / "model", "--max-new-tokens", 64, *options[command]) == 1
    printed = capsys.readouterr().err
    error = printed[printed.index(f"s2ft {command}: error: ") :].splitlines()
    assert "error: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB; " in error[0]
    assert error[0].endswith(f"; {switch} needs less") and len(error) == 1


@pytest.mark.parametrize(
    "batch, checkpointing, switch",
    (
        (8, False, "--gradient-checkpointing"),
        (8, True, "--per-device-train-batch-size 4 --gradient-accumulation-steps 4"),
        (3, True, "--per-device-train-batch-size 1 --gradient-accumulation-steps 6"),
        (1, True, "--load-in-4bit or a smaller --max-length"),
    ),
)
def test_the_switch_that_helps(batch, checkpointing, switch):
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    assert smaller_step(SimpleNamespace(**dict(zip(names, (batch, 2, checkpointing))))) == switch


def test_errors_of_all_allocators_are_known_and_shown_without_statistics():
    assert all(is_out_of_memory(error) for error in (GPU, ON_CPU, MemoryError()))
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="^shape"), explain_out_of_memory("--less"):
        raise RuntimeError("shape '[2]' is invalid")
    assert words_of_allocator(GPU) == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert words_of_allocator(ON_CPU).startswith(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    )
    assert words_of_allocator(MemoryError()) == "MemoryError"
