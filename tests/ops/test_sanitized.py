"""Runs the tests of this folder again on kernels with the address and undefined-behaviour sanitizers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import sanitizers
from support.sources import copy_sources

FILES = sorted(
    str(path) for path in Path(__file__).resolve().parent.glob("test_*.py") if path != Path(__file__).resolve()
)

# Runs the tests on the module in the given folder. Three threads are used, so that the kernels divide their work.
RUN_TESTS = """
import sys, pytest, torch, s2ft._C
assert s2ft._C.__file__.startswith(sys.argv[1]), s2ft._C.__file__
class Threads:
    def pytest_collection_finish(self):
        torch.set_num_threads(3)
# These tests call the same kernels on the same shapes again, and need much time in Python.
again = "not (opcheck or fullgraph or compiled_equals or derivatives)"
options = ["-qs", "-p", "no:cacheprovider", "-m", "not slow", "-k", again]
sys.exit(pytest.main([*options, *sys.argv[2:]], plugins=[Threads()]))
"""

# A call whose delta has 24 floats that begin at byte `offset` of memory with only `size` bytes.
CALL_WITH_A_PLANTED_DELTA = """
import ctypes, sys, torch, s2ft.ops
size, offset = map(int, sys.argv[1:])
memory = torch.zeros(size, dtype=torch.uint8)
claimed = (ctypes.c_char * 97).from_address(memory.data_ptr())
delta = torch.frombuffer(claimed, dtype=torch.float32, count=24, offset=offset).view(4, 6)
torch.ops.s2ft.write_slices_([torch.ones(8, 6)], [torch.ones(4, 6)], [delta], [None], [2], [0])
"""


@pytest.fixture
def sanitized(tmp_path):
    """run(code, *arguments) starts Python in a process of its own, with the sanitized build."""
    source = copy_sources(tmp_path / "source")
    environment = sanitizers.environment(PYTHONPATH=str(source / "built"))
    flags = {"CXXFLAGS": " ".join(("-O0", "-g1", *sanitizers.FLAGS)), "LDFLAGS": sanitizers.FLAGS[0]}
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"],
        cwd=source,
        text=True,
        capture_output=True,
        env={**os.environ, "S2FT_BUILD": "cpu", **flags},
    )
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]

    def run(code, *arguments):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=source / "built",
            env=environment,
            text=True,
            capture_output=True,
        )

    return run


@pytest.mark.slow
def test_no_overrun_and_no_undefined_behaviour(sanitized, tmp_path):
    """First, a correct call passes, and a read behind the end of the memory and a misaligned one both end the process."""
    right = sanitized(CALL_WITH_A_PLANTED_DELTA, 97, 0)
    assert right.returncode == 0, right.stderr[-3000:]
    for size, offset, report in ((95, 0, "heap-buffer-overflow"), (97, 1, "misaligned address")):
        wrong = sanitized(CALL_WITH_A_PLANTED_DELTA, size, offset)
        assert wrong.returncode != 0 and report in wrong.stderr and "csrc/cpu/" in wrong.stderr, wrong.stderr[-3000:]
    result = sanitized(RUN_TESTS, tmp_path, *FILES)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
