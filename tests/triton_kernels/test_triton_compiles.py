"""All kernels compile for GPUs that are not here. The machine code for NVIDIA keeps its numbers in registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("vendor", ("nvidia", pytest.param("amd", marks=pytest.mark.slow)))
def test_every_kernel_compiles_without_spills(vendor, tmp_path):
    """A process of its own, because kernels of Triton's interpreter can't be compiled."""
    from tests.triton_kernels import ahead_of_time  # it imports Triton

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.triton_kernels.ahead_of_time", vendor]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    expected = len(list(ahead_of_time.cases())) * len(ahead_of_time.NVIDIA if vendor == "nvidia" else ahead_of_time.AMD)
    assert len(lines) == expected
    assert all(line.endswith("an access" if vendor == "nvidia" else "compiled") for line in lines)
