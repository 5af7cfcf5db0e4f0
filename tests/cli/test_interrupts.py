"""A run that is killed at any moment resumes from its last checkpoint and ends with the same result."""

import json
import os
import random
import signal
import threading
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file
from support.inside import checkpoints, newest_valid, read_log
from train.tiny import save_tiny

from s2ft.cli.main import main

STEPS, SAVE = 30, 3


def command(work, output, *more):
    return [
        "sft",
        "--model",
        str(work / "model"),
        "--data",
        str(work / "data.jsonl"),
        "--output",
        str(output),
        "--max-steps",
        str(STEPS),
        "--batch-size",
        "4",
        "--micro-batch-size",
        "2",
        "--learning-rate",
        "1e-2",
        "--save-steps",
        str(SAVE),
        "--d-ratio",
        "0.1",
        "--o-ratio",
        "0.25",
        *more,
    ]


def logged(output):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(output / "log.jsonl")]


@pytest.fixture(scope="module")
def work(work):
    save_tiny(work / "model", attention_dropout=0.1)
    assert main(command(work, work / "whole")) == 0
    return work


def run_until(step, log, arguments):
    """Run a command. A thread kills this process as soon as the log contains a step: at any moment between two steps,
    since it does not wait for the others. Another process might look too late."""

    def kill():
        while all(line["step"] < step for line in read_log(log)):
            threading.Event().wait(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    main(arguments)


def kill_at(step, work, output, *more):
    """Run in another process until the log contains `step`. Returns the last step in the log."""
    arguments = (step, output / "log.jsonl", command(work, output, *more))
    process = get_context("fork").Process(target=run_until, args=arguments)  # a fork imports nothing again
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return logged(output)[-1][0]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(work, tmp_path, kills, caplog):
    output, moments = tmp_path / "out", random.Random(kills)
    done = 0
    for number in range(kills):
        step = min(STEPS - 2, done + moments.randint(1, STEPS // kills - 1))
        done = kill_at(step, work, output, *(["--resume"] if number else []))
        found = newest_valid(output)  # the last checkpoint before the last logged step exists
        assert (done - 1) // SAVE * SAVE <= (int(found.name.rpartition("-")[2]) if found else 0)
    caplog.set_level("INFO")
    assert main(command(work, output, "--resume")) == 0
    assert f"resuming from {found.name if found else 'the start'}" in caplog.text
    assert logged(output) == logged(work / "whole")
    ours, whole = (load_file(folder / "adapter/s2ft_adapter.safetensors") for folder in (output, work / "whole"))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in whole)
    assert json.loads((output / "report.json").read_text())["steps"] == STEPS
    assert len(checkpoints(output)) == 2 and not (output / ".unfinished").exists()
