"""Exchange units of a weight with a saved copy, which switches an adapter on and off."""

from torch import Tensor

from s2ft.ops._library import check_distinct, check_movable, count_change, define, host_can_read
from s2ft.ops._memory import writing


def reference(weight: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    check_movable("swap_", weight, dim, index, values, "values")
    if values.dtype != weight.dtype:
        raise ValueError(f"swap_: values must have weight's dtype {weight.dtype}, got {values.dtype}")
    if host_can_read(index):
        check_distinct("swap_", index, weight.shape[dim])
    held = weight.index_select(dim, index)
    # On the transpose the index is the first dimension, where torch writes whole rows at a time.
    weight.transpose(0, dim)[index] = values.transpose(0, dim)
    values.copy_(held)


_op = define(
    "swap_(Tensor(a!) weight, Tensor index, Tensor(b!) values, int dim) -> ()",
    writing("swap_", reference),
    lambda weight, index, values, dim: None,
)


def swap_(
    weight: Tensor,  # 1-D to 3-D, changed in place
    index: Tensor,  # [n], int64, no index twice
    values: Tensor,  # weight.shape with dim -> n, same dtype, changed in place
    dim: int,
    *,
    is_checked: bool = False,
) -> None:
    """Exchange the units `index` of a weight with `values`, in place.

    A second call with the same arguments restores both, bit for bit. Adding and subtracting a delta would not.

    Args:
        weight: Tensor with 1 to 3 dimensions, any dtype of 1, 2, 4 or 8 bytes. It is changed in place.
        index: Units of the weight, shape [n], int64, without duplicates.
        values: Tensor with the weight's shape and dtype, but n units along `dim`. It is changed in place.
        dim: Dimension of the units.
        is_checked: Whether the caller knows that the entries of `index` are in range and distinct. On a GPU this check
            waits for the device. With entries that are not, the result is undefined. Default: they are checked.

    Raises:
        ValueError: `dim`, a shape, a dtype or `index` is wrong. Nothing has been written then.
            A CUDA graph can't wait for this check, so a captured call leaves it out: call once before the capture.

    Example:
        >>> weight, values = torch.zeros(3, 2), torch.ones(1, 2)
        >>> s2ft.ops.swap_(weight, torch.tensor([1]), values, 0)
        >>> weight.tolist(), values.tolist()
        ([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0]])
    """
    if weight.is_cuda and not is_checked:
        check_distinct("swap_", index, weight.shape[dim])
    _op(weight, index, values, dim)
    count_change(weight, values)
