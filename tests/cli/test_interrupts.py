"""A run that is killed or interrupted at any moment resumes and ends with the same result."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from multiprocessing import get_context

import pytest
import torch
from support.commands import files_of
from support.inside import checkpoints, newest_valid, read_log
from support.states import same, tensors_of
from train.tiny import save_tiny

from s2ft.cli.main import main

STEPS, SAVE = 20, 3


def command(work, output, *more):
    return [
        "sft",
        *files_of(work, output),
        *f"--max-steps {STEPS} --save-steps {SAVE} --batch-size 4 --micro-batch-size 2 --learning-rate 1e-2".split(),
        *"--d-ratio 0.1 --o-ratio 0.25".split(),
        *more,
    ]


def logged(output):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(output / "log.jsonl")]


@pytest.fixture(scope="module")
def work(work):
    save_tiny(work / "model", attention_dropout=0.1)
    assert main(command(work, work / "whole")) == 0
    return work


def signal_at(step, log, number, times=1):
    """A thread sends this process a signal as soon as the log contains a step: at any moment between two steps, since
    it does not wait for the others. Another process might look too late."""

    def send():
        while all(line["step"] < step for line in read_log(log)):
            threading.Event().wait(0.002)
        for _ in range(times):
            os.kill(os.getpid(), number)
            threading.Event().wait(0.01)

    threading.Thread(target=send, daemon=True).start()


def run_until(step, log, words, threads):
    torch.set_num_threads(threads)
    signal_at(step, log, signal.SIGKILL)
    main(words)


def kill_at(step, work, output, *more):
    """Run in another process until the log contains `step`. Returns the last step in the log."""
    words = step, output / "log.jsonl", command(work, output, *more), torch.get_num_threads()
    # A fork imports nothing again, and has no OpenMP.
    process = get_context("fork" if words[-1] == 1 else "spawn").Process(target=run_until, args=words)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return logged(output)[-1][0]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_and_resumed_equals_an_uninterrupted_one(work, tmp_path, kills, caplog):
    output, moments, done = tmp_path / "out", random.Random(kills), 0
    for number in range(kills):
        step = min(STEPS - 2, done + moments.randint(1, STEPS // kills - 1))
        done = kill_at(step, work, output, *(["--resume"] if number else []))
        found = newest_valid(output)  # the last checkpoint before the last logged step exists
        assert (done - 1) // SAVE * SAVE <= (int(found.name.rpartition("-")[2]) if found else 0)
    caplog.set_level("INFO")
    assert_resumed(work, output)
    assert f"resuming from {found.name if found else 'the start'}" in caplog.text


def assert_resumed(work, output):
    assert main(command(work, output, "--resume")) == 0 and logged(output) == logged(work / "whole")
    assert same(tensors_of(output / "adapter"), tensors_of(work / "whole/adapter"))
    assert json.loads((output / "report.json").read_text())["steps"] == STEPS
    assert len(checkpoints(output)) == 2 and not (output / ".unfinished").exists()


def test_the_first_ctrl_c_saves_after_the_update_and_says_how_to_go_on(work, tmp_path, capsys):
    output = tmp_path / "out"
    signal_at(7, output / "log.jsonl", signal.SIGINT)
    assert main(command(work, output)) == 130
    stopped = logged(output)[-1][0]
    assert 7 <= stopped < STEPS and newest_valid(output).name == f"checkpoint-{stopped}"
    assert f"  s2ft sft --config {output / 'config.yaml'} --output {output} --resume" in capsys.readouterr().out
    assert_resumed(work, output)


def test_a_second_ctrl_c_ends_the_run_at_once(work, tmp_path, capsys, monkeypatch):
    """It waits for no update: here the first one never ends."""
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_, **__: [signal.raise_signal(signal.SIGINT) for _ in "12"])
    assert main(command(work, tmp_path / "out")) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "s2ft sft: interrupted" and not checkpoints(tmp_path / "out")


HIDING = {"__del__": lambda kind: kind(), "__set_name__": lambda kind: type("Made", (), {"field": kind()})}


@pytest.mark.parametrize("method", HIDING)
def test_ctrl_c_inside_a_method_that_hides_it_is_not_lost(monkeypatch, method):
    """Python can't raise it in a finalizer, and makes another error of it in a class that is being made."""

    def run(_):
        HIDING[method](type("Field", (), {method: lambda *_: signal.raise_signal(signal.SIGINT)}))
        threading.Event().wait(10)

    monkeypatch.setattr("s2ft.cli.plan.run_plan", run)
    assert main(["plan"]) == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_an_interrupt_at_any_moment_ends_the_run_without_a_traceback(work, tmp_path, number):
    """In the start of the process or in training. Then the run is resumed, or begins again."""
    output, delay = tmp_path / "out", random.Random(number).uniform(0.3, 20)
    process = subprocess.Popen(
        [sys.executable, "-m", "s2ft", *command(work, output)], stderr=subprocess.PIPE, text=True
    )
    threading.Timer(delay, process.send_signal, (signal.SIGINT,)).start()
    said = process.communicate(timeout=120)[1]
    assert process.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in said  # the last: while Python ends
    if (output / "run.json").is_file():
        assert_resumed(work, output)
