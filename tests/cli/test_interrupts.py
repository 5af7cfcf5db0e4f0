"""A run that is killed at any moment resumes from its last checkpoint and ends with the same result."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from train.tiny import save_tiny, sums, write_jsonl

from s2ft.train.checkpoints import checkpoints, newest_valid
from s2ft.train.output import read_log

STEPS, SAVE = 120, 3


def command(work, output, *more):
    return [
        sys.executable,
        "-m",
        "s2ft.cli",
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
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model", attention_dropout=0.1)
    write_jsonl(work / "data.jsonl", sums(30))
    whole = start(work, work / "whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    return work


def start(work, output, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the rounding of sums depends on the number of threads
    return subprocess.Popen(
        command(work, output, *more), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def kill_at(process, output, step):
    """Send SIGKILL as soon as the log contains `step`. Returns the last step in the log."""
    while max((line[0] for line in logged(output)), default=0) < step:
        try:
            process.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the run ended before it was killed: {process.stderr.read()}")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return logged(output)[-1][0]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(work, tmp_path, kills):
    output, moments = tmp_path / "out", random.Random(kills)
    done = 0
    for number in range(kills):
        process = start(work, output, *(["--resume"] if number else []))
        done = kill_at(process, output, min(STEPS - 2, done + moments.randint(1, STEPS // kills - 1)))
        found = newest_valid(output)  # the last checkpoint before the last logged step exists
        assert (done - 1) // SAVE * SAVE <= (int(found.name.rpartition("-")[2]) if found else 0)
    last = start(work, output, "--resume")
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert f"resuming from {found.name}" in errors if found else "resuming from the start" in errors
    assert logged(output) == logged(work / "whole")
    ours, whole = (load_file(folder / "adapter/s2ft_adapter.safetensors") for folder in (output, work / "whole"))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in whole)
    assert json.loads((output / "report.json").read_text())["steps"] == STEPS
    assert len(checkpoints(output)) == 2 and not (output / ".unfinished").exists()
