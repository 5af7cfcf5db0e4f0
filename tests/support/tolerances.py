"""The tolerances of all tests: (rtol, atol) of the result of a matrix product by dtype."""

from collections.abc import Sequence

import torch

GEMM = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}
LOGITS = 1e-5  # relative to the largest logit, in float32, after attach, merge or export


def relative_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


def assert_close(
    ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], dtype: torch.dtype, exact: int = 0
) -> None:
    """The results of products in a dtype are equal within rounding. The first `exact` tensors have the same bits."""
    rtol, atol = GEMM[dtype]
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if i < exact:
            assert one.dtype == other.dtype and torch.equal(one, other)
        else:
            scale = max(1.0, other.abs().max().item()) if other.numel() else 1.0
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol * scale)
