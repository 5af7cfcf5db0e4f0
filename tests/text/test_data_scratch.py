"""Temporary files of data are removed at the end of their process, and those of a killed process by the next one."""

import os
import signal
import subprocess
import sys

MAKE = """
import os, signal, sys
from s2ft.text.data.sources import scratch_folder
path = scratch_folder() / "a.arrow"
path.write_text("rows")
"""
FORK = """
if os.fork() == 0:
    sys.exit()
os.wait()
print(path.exists())
"""
WAIT = "print('made', flush=True); input()"
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def start(script, folder):
    variables = {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", MAKE + script]
    return subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_the_process_that_made_the_folder_removes_it_and_not_one_that_it_forked(tmp_path):
    said, _ = start(FORK, tmp_path).communicate()
    assert said == "True\n"
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path):
    killed = start(KILL, tmp_path)
    assert killed.wait() == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    start("", tmp_path).communicate()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_process_that_runs_is_left_alone(tmp_path):
    running = start(WAIT, tmp_path)
    assert running.stdout.readline() == "made\n"
    start("", tmp_path).communicate()
    (folder,) = tmp_path.iterdir()
    assert (folder / "a.arrow").read_text() == "rows"
    running.communicate("\n")
    assert list(tmp_path.iterdir()) == []
