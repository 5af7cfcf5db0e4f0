"""Temporary files of data are removed at the end of the process, and those of killed processes by the next one."""

import signal
import subprocess
import sys

SCRIPT = """
import os, signal, sys
from pathlib import Path
from s2ft.text.data.sources import scratch_folder
path = scratch_folder() / "a.arrow"
path.write_text("rows")
before = len(list(path.parent.parent.glob("s2ft-data-*")))
if sys.argv[1] == "child":
    if os.fork() == 0:
        sys.exit()  # a forked process leaves the folder alone
    os.wait()
print(before, path.exists(), flush=True)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "wait":
    input()
"""


def start(how, folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how], env={"TMPDIR": str(folder), "PYTHONPATH": ":".join(filter(None, sys.path))},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_folders_are_removed_unless_their_process_runs(tmp_path):
    running = start("wait", tmp_path)
    assert running.stdout.readline() == "1 True\n"
    killed = start("kill", tmp_path)
    assert killed.communicate()[0] == "2 True\n" and killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert start("child", tmp_path).communicate()[0] == "2 True\n"  # its own and that of the running process
    assert running.communicate("\n")[0] == "" and list(tmp_path.iterdir()) == []
