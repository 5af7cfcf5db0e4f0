"""Runs the tests of this folder again on kernels with the address and undefined-behaviour sanitizers."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import sanitizers

FILES = sorted(
    str(path) for path in Path(__file__).resolve().parent.glob("test_*.py") if path != Path(__file__).resolve()
)


# The simulator's own kernel adds `claimed` floats, but there are only 64.
SUM = """
import ctypes, sys, torch
values, out = torch.ones(64), torch.zeros(1)
library, claimed = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
library.block_sum(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()), claimed, 0)
"""


def python(library, *arguments):
    environment = sanitizers.environment(S2FT_TEST_CUDA_ON_CPU=str(library))
    return subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_no_overrun_and_no_undefined_behaviour(sanitized_library):
    right, wrong = (python(sanitized_library, "-c", SUM, sanitized_library, claimed) for claimed in (64, 65))
    assert right.returncode == 0, right.stderr[-3000:]
    assert wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr, wrong.stderr[-3000:]
    run = python(sanitized_library, "-m", "pytest", "-qs", "-p", "no:cacheprovider", *FILES)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
