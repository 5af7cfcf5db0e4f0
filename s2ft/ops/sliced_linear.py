"""Linear layer whose only trainable weights are a contiguous slice (paper, section 3.3)."""

from torch import Tensor

from s2ft.ops import _linear
from s2ft.ops._library import autocast_input, check_linear

_op = _linear.define_linear("sliced_linear", "int start")


def sliced_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    start: int,
    dim: int,
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [..., O]
    """y = x @ Wᵀ + bias, with W = weight and ``W.narrow(dim, start, n) += delta``.

    One dense GEMM each way. base + delta is summed in the wider of the two dtypes and rounded once
    to the weight's, so the numbers are those of ``F.linear`` on the merged weight, bit for bit.
    Gradients flow to x, delta and bias, any number of times, never to weight; for dim 1 only x's slice is kept for them.
    The weight is written to during the call and is bit-identical after it: calls on the CPU lock each
    other out, CUDA calls on one weight must share a stream.

    Dtypes: float32, float64, bfloat16, float16; delta may be wider than weight. Under autocast x and
    the result have autocast's dtype and weight keeps its own.
    Raises: ValueError for a wrong shape, dim, or a slice that leaves weight; TypeError for mixed x and
    weight dtypes outside autocast.
    """
    check_linear("sliced_linear", x, weight, delta, dim, bias)
    stop = start + delta.shape[dim]
    if not 0 <= start <= stop <= weight.shape[dim]:
        raise ValueError(f"sliced_linear: slice {start}:{stop} outside weight.shape[{dim}]={weight.shape[dim]}")
    return _linear.apply(_op, autocast_input("sliced_linear", x, weight), weight, delta, start, dim, bias)
