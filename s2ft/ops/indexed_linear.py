"""Linear layer whose only trainable weights are scattered rows or columns (layout ``indexed``)."""

from torch import Tensor

from s2ft.ops import _linear

_linear.define_linear("indexed_linear", "Tensor index")


def indexed_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    index: Tensor,  # [n], int64, no index twice
    dim: int,
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [..., O]
    """Compute ``x @ W.t() + bias``, where W is `weight` with `delta` added to the units in `index`.

    The contract is that of :func:`s2ft.ops.sliced_linear`, for units that are not neighbours. An index outside the
    weight raises before anything is written. On CUDA the entries of an index are not checked, because the check would
    stall the device: the layers check their index once, when they are made.

    Args:
        x: Input, shape [..., I]. Under autocast it is cast to autocast's dtype.
        weight: Frozen weight, shape [O, I], float32, float64, bfloat16 or float16.
        delta: Trained update of n units, shape [n, I] if dim is 0, else [O, n]. Its dtype may be wider than the
            weight's.
        index: Selected units, shape [n], int64, without duplicates.
        dim: 0 if the units are outputs (rows of the weight), 1 if they are inputs (columns).
        bias: Bias, shape [O]. Default: none.

    Returns:
        The output, shape [..., O], in the dtype of x, or in autocast's dtype.

    Raises:
        ValueError: A shape or `dim` is wrong, or `index` has an entry outside the weight.
        TypeError: x and weight differ in dtype outside autocast.

    Example:
        >>> x, weight, delta = torch.ones(1, 4), torch.zeros(2, 4), torch.ones(2, 2)
        >>> s2ft.ops.indexed_linear(x, weight, delta, torch.tensor([3, 0]), dim=1)
        tensor([[2., 2.]])
    """
    return _linear.call("indexed_linear", x, weight, delta, index, dim, bias)
