"""Linear layer whose only trainable weights are a contiguous slice (S²FT paper, section 3.3)."""

from torch import Tensor

from s2ft.ops import _linear

_linear.define_linear("sliced_linear", "int start")


def sliced_linear(
    x: Tensor,  # [..., I]
    weight: Tensor,  # [O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    start: int,
    dim: int,
    bias: Tensor | None = None,  # [O]
) -> Tensor:  # [..., O]
    """Compute ``x @ W.t() + bias``, where W is `weight` with `delta` added to the units start to start + n - 1.

    Each direction is one dense matrix product. base + delta is summed in the wider of the two dtypes and rounded once
    to the weight's dtype, so the result equals ``F.linear`` on the merged weight, bit for bit. Gradients of any order
    flow to x, delta and bias, never to weight. For dim 1, only the selected columns of x are saved for the backward
    (S²FT paper, section 3.3).

    The product multiplies by a copy of the weight. The layers of an attached model need none, because their weights
    hold base + delta.

    Args:
        x: Input, shape [..., I]. Under autocast it is cast to autocast's dtype.
        weight: Frozen weight, shape [O, I], float32, float64, bfloat16 or float16.
        delta: Trained update of n units, shape [n, I] if dim is 0, else [O, n]. Its dtype may be wider than the
            weight's.
        start: First unit of the slice.
        dim: 0 if the units are outputs (rows of the weight), 1 if they are inputs (columns).
        bias: Bias, shape [O]. Default: none.

    Returns:
        The output, shape [..., O], in the dtype of x, or in autocast's dtype.

    Raises:
        ValueError: A shape or `dim` is wrong, or the slice does not lie inside the weight.
        TypeError: x and weight differ in dtype outside autocast.

    Example:
        >>> weight, delta = torch.zeros(4, 3), torch.ones(2, 3, requires_grad=True)
        >>> y = s2ft.ops.sliced_linear(torch.ones(1, 3), weight, delta, start=1, dim=0)
        >>> y.tolist()
        [[0.0, 3.0, 3.0, 0.0]]
        >>> y.sum().backward()
        >>> delta.grad.shape
        torch.Size([2, 3])
    """
    return _linear.call("sliced_linear", x, weight, delta, start, dim, bias)
