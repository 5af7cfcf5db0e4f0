"""The same tests once more with the address and undefined-behaviour sanitizers in the kernels."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def sanitizer_library():
    compiler = os.environ.get("CXX", "g++")
    try:
        path = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    except OSError:
        pytest.skip("no C++ compiler")
    if not os.path.isabs(path):
        pytest.skip("no libasan")
    return path


@pytest.mark.slow
def test_no_overrun_and_no_undefined_behaviour(sanitized_library):
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer_library(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "S2FT_TEST_CUDA_ON_CPU": str(sanitized_library),
    }
    files = [HERE / name for name in ("test_cuda_simulator.py", "test_cuda_units.py", "test_cuda_swap.py", "test_cuda_order.py")]
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
