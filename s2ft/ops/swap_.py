"""Exchange rows or columns of a weight with a saved copy: how an adapter is put on and taken off."""

from torch import Tensor

from s2ft.ops._effective import in_turn
from s2ft.ops._library import check_distinct, check_movable, count_change, define


def reference(weight: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    check_movable("swap_", weight, dim, index, values, "values")
    if values.dtype != weight.dtype:
        raise ValueError(f"swap_: values must have weight's dtype {weight.dtype}, got {values.dtype}")
    check_distinct("swap_", index, weight.shape[dim])
    held = weight.index_select(dim, index)
    # On the transpose the index comes first, where torch writes whole rows at a time.
    weight.transpose(0, dim)[index] = values.transpose(0, dim)
    values.copy_(held)


_op = define(
    "swap_(Tensor(a!) weight, Tensor index, Tensor(b!) values, int dim) -> ()",
    in_turn("swap_", reference),
    lambda weight, index, values, dim: None,
)


def swap_(
    weight: Tensor,  # 1-D to 3-D, changed in place
    index: Tensor,  # [n], int64, no index twice
    values: Tensor,  # weight.shape with dim -> n, same dtype, changed in place
    dim: int,
) -> None:
    """Exchange ``weight[index]`` along dim with values, element for element.

    A second call with the same arguments gives both back bit for bit, which adding and subtracting
    would not. Raises: ValueError for a wrong dim, shape, dtype, or index, before anything is written.
    """
    if weight.is_cuda:
        check_distinct("swap_", index, weight.shape[dim])
    _op(weight, index, values, dim)
    count_change(weight, values)
