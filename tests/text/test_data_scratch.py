"""Temporary files of data are removed at the end of the process, and not by one that it has forked."""

import subprocess
import sys

SCRIPT = """
import os, sys
from s2ft.text.data.sources import scratch_folder
path = scratch_folder() / "a.arrow"
path.write_text("rows")
if os.fork() == 0:
    sys.exit()
os.wait()
print(path.exists())
"""


def test_the_process_that_made_the_folder_removes_it(tmp_path):
    variables = {"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True)
    assert done.stdout == "True\n" and list(tmp_path.iterdir()) == []
