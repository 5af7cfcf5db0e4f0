"""Linear layer whose only trainable weights are scattered rows or columns (layout ``indexed``)."""

from torch import Tensor

from s2ft.ops import _linear
from s2ft.ops._library import autocast_input, check_index, check_linear

_op = _linear.define_linear("indexed_linear", "Tensor index")


def indexed_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    index: Tensor,  # [n], int64, no index twice
    dim: int,
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [..., O]
    """y = x @ Wᵀ + bias, with W = weight and ``W.index_select(dim, index) += delta``.

    The same contract as :func:`s2ft.ops.sliced_linear`, for units that lie anywhere. An index outside
    the weight raises before anything is written (on CUDA, where looking would stall the device, the
    layers check it once when they are made).
    """
    check_linear("indexed_linear", x, weight, delta, dim, bias)
    check_index("indexed_linear", index, delta.shape[dim], weight.shape[dim])
    return _linear.apply(_op, autocast_input("indexed_linear", x, weight), weight, delta, index, dim, bias)
