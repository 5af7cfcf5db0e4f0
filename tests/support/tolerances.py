"""The tolerances of all tests: (rtol, atol) of the result of a matrix product by dtype."""

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
