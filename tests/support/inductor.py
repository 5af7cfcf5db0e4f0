"""Skips tests where inductor, the default compiler of torch.compile, gives wrong results.

The inductor of PyTorch 2.13 has an error if ATEN_CPU_CAPABILITY selects a smaller processor than the one it runs on.
With ATEN_CPU_CAPABILITY=avx2 on a processor with AVX-512, ``torch.compile(lambda a, b: (a.t() @ b).float())`` of
bfloat16 matrices [3, 3] and [3, 11] does not write elements 16 to 31 of the result. With "default" it does not compile.
"""

import os

import pytest


def skip_where_wrong() -> None:
    """Skip a test of compiled code where PyTorch itself compiles wrongly."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("PyTorch's inductor is wrong under ATEN_CPU_CAPABILITY")
