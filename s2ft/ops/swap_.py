"""Exchange rows or columns of a weight with a saved copy: how an adapter is put on and taken off."""
import torch
from torch import Tensor

from s2ft.ops._library import check_index, count_change, define


def reference(weight: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    held = weight.index_select(dim, index)
    # On the transpose the index comes first, where torch writes whole rows at a time.
    weight.transpose(0, dim)[index] = values.transpose(0, dim)
    values.copy_(held)


_op = define("swap_(Tensor(a!) weight, Tensor index, Tensor(b!) values, int dim) -> ()",
             reference, lambda weight, index, values, dim: None)


def swap_(weight: Tensor,   # 1-D to 3-D, changed in place
          index: Tensor,    # [n], int64, no index twice
          values: Tensor,   # weight.shape with dim -> n, same dtype, changed in place
          dim: int) -> None:
    """Exchange ``weight[index]`` along dim with values, element for element.

    A second call with the same arguments gives both back bit for bit, which adding and subtracting
    would not. Raises: ValueError for a wrong dim, shape, dtype, or index, before anything is written.
    """
    if not (1 <= weight.dim() <= 3 and 0 <= dim < weight.dim()):
        raise ValueError(f"swap_: weight must have 1 to 3 dimensions and dim be one of them, "
                         f"got shape {tuple(weight.shape)} and dim {dim}")
    check_index("swap_", index, index.numel(), weight.shape[dim])
    shape = (*weight.shape[:dim], index.numel(), *weight.shape[dim + 1:])
    if values.shape != shape or values.dtype != weight.dtype:
        raise ValueError(f"swap_: values must be {weight.dtype} of shape {shape}, "
                         f"got {values.dtype} of shape {tuple(values.shape)}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.unique().numel() != index.numel():
        raise ValueError("swap_: index names a unit twice")
    _op(weight, index, values, dim)
    count_change(weight)
    count_change(values)
