"""Where the default compiler of torch.compile can be relied on.

Told to behave as a smaller processor than it runs on, PyTorch 2.13's inductor is wrong by itself: with
ATEN_CPU_CAPABILITY=avx2 on a processor with AVX-512, ``torch.compile(lambda a, b: (a.t() @ b).float())`` of bfloat16
matrices [3, 3] and [3, 11] leaves elements 16 to 31 of the result unwritten; with "default" it does not compile.
"""

import os

import pytest


def skip_where_wrong() -> None:
    """Skip a test of compiled code where plain PyTorch compiles wrongly."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("PyTorch's inductor is wrong under ATEN_CPU_CAPABILITY")
