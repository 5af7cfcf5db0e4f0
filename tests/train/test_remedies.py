"""Out of memory: which errors are taken for it, what is advised, and that the numbers are those of s2ft.estimate."""

from dataclasses import replace

import pytest
import torch
from train.tiny import tiny_model

import s2ft
from s2ft.train.out_of_memory import OutOfMemory, first_line, is_out_of_memory
from s2ft.train.remedies import Count, Step, explain_out_of_memory, loss_in_chunks, quantizable, remedies

CPU = torch.device("cpu")
CONFIG = s2ft.S2FTConfig(d_ratio=0.2)
STEP = Step(batch=8, length=256, chunked_loss=False)
ON_GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1.2 GiB is free."
)
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "99 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def attached():
    model = tiny_model(tie_word_embeddings=False)
    s2ft.attach(model, CONFIG)
    return model


@pytest.fixture(scope="module")
def count(attached):
    return Count(attached, CPU)


def peak_of(batch, length, loss=None, **options):
    return s2ft.estimate(
        tiny_model(tie_word_embeddings=False), CONFIG, batch, length, use_cache=False, loss=loss, **options
    ).peak


def test_an_error_of_an_allocator_is_explained(attached, count, monkeypatch):
    monkeypatch.setattr("s2ft.train.remedies.Count", lambda *_: count)  # it remembers what the other tests count
    with pytest.raises(OutOfMemory) as found:
        with explain_out_of_memory(attached, lambda: STEP, lambda: "checkpoint-7 is kept"):
            raise ON_CPU
    text = str(found.value)
    assert text.startswith("out of memory on cpu: ") and "checkpoint-7 is kept" in text
    for words in ("a step of 8 × 256 tokens takes", "--gradient-checkpointing", "--per-device-train-batch-size"):
        assert words in text
    assert found.value.__cause__ is ON_CPU


def test_errors_of_all_allocators_are_known():
    assert all(is_out_of_memory(error) for error in (ON_GPU, ON_CPU, MemoryError()))


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="^shape"):
        with explain_out_of_memory(tiny_model(), lambda: STEP, str):
            raise RuntimeError("shape '[2]' is invalid")
    assert not is_out_of_memory(ValueError("out of memory"))


def test_an_allocators_statistics_are_left_out():
    assert first_line(ON_GPU) == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert first_line(ON_CPU).startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    assert first_line(MemoryError()) == "MemoryError"


def test_the_numbers_are_those_of_the_estimate(count):
    found = {remedy.switches: remedy.peak for remedy in remedies(count, STEP, None)}
    assert count(STEP) == peak_of(8, 256)
    assert found["--gradient-checkpointing"] == peak_of(8, 256, gradient_checkpointing=True)
    assert found["without --no-chunked-loss"] == peak_of(8, 256, loss_in_chunks)
    assert found["--per-device-train-batch-size 4 --gradient-accumulation-steps 2"] == peak_of(4, 256, accumulation=2)
    assert found["--max-length 128"] == peak_of(8, 128)
    assert all(peak < count(STEP) for peak in found.values())


def test_what_fits_comes_first_and_the_largest_batch_that_fits_is_named(count):
    step = replace(STEP, chunked_loss=True)
    room = count(replace(step, batch=2, accumulation=4))
    found = remedies(count, step, room)
    fits = [remedy.peak <= room for remedy in found]
    assert fits == sorted(fits, reverse=True) and fits[0]
    assert found[0].switches == "--per-device-train-batch-size 2 --gradient-accumulation-steps 4"
    assert found[0].peak == room


def test_if_no_change_is_enough_all_of_them_are_named_together(count):
    last = remedies(count, STEP, room=1)[-1]
    assert "--gradient-checkpointing --per-device-train-batch-size 1" in last.switches
    assert last.peak < peak_of(1, 256, loss_in_chunks, gradient_checkpointing=True, accumulation=8)


def test_a_quantized_base_saves_what_its_linear_layers_save(count):
    weights = quantizable(count.hollow)
    assert len(weights) == 14 and max(weights) == 2048  # without the output layer
    assert count.saved("4bit") == int(sum(weights) * (4 - 4.5 / 8) - 4 * max(weights))
    assert count.saved(None) == 0 and count(STEP, "4bit") == count(STEP) - count.saved("4bit")


def test_an_estimate_that_fails_does_not_hide_the_error(attached):
    def unknown():
        raise ValueError("no step")

    with pytest.raises(OutOfMemory, match="Tried to allocate 2.00 GiB\nlower --per-device-train-batch-size"):
        with explain_out_of_memory(attached, unknown, str):
            raise ON_GPU


def test_pairs_count_twice_and_prompts_are_not_shortened(count):
    assert count(replace(STEP, batch=4, sequences=2)) == count(STEP)
    step = replace(STEP, batch=1, prompt=100, length=300, shortens="--max-completion-length")
    assert "--max-completion-length 100" in [remedy.switches for remedy in remedies(count, step, None)]
