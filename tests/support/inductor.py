"""Whether torch.compile is right here by itself.

Told to behave as a smaller processor (ATEN_CPU_CAPABILITY=avx2 on one with AVX-512), PyTorch 2.13's inductor leaves
half of a cast from bfloat16 to float32 unwritten, and for "default" it does not compile at all.
"""
import functools
import os

import pytest
import torch


@functools.lru_cache(maxsize=None)
def _is_right() -> bool:
    def product(a, b):
        return (a.t() @ b).to(torch.float32)

    a, b = torch.randn(3, 3, dtype=torch.bfloat16), torch.randn(3, 11, dtype=torch.bfloat16)
    compiled = torch.compile(product, fullgraph=True)
    try:
        for _ in range(20):
            used = [torch.full((3, 11), 7.7) for _ in range(50)]   # so that unwritten memory is not right by chance
            del used
            if not torch.equal(compiled(a, b), product(a, b)):
                return False
    except Exception:
        return False
    return True


def skip_where_wrong() -> None:
    """Skip a test of compiled code under a setting for which plain PyTorch compiles wrongly."""
    if os.environ.get("ATEN_CPU_CAPABILITY") and not _is_right():
        pytest.skip("torch.compile is wrong here without s2ft: ATEN_CPU_CAPABILITY")
