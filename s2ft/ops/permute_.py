"""Reorder rows or columns of a weight in place: co-permutation (paper, section 3.2)."""
import torch
from torch import Tensor

from s2ft.ops._library import count_change, define


def reference(weight: Tensor, order: Tensor, dim: int) -> None:
    moved = (order != torch.arange(order.numel(), device=order.device)).nonzero().squeeze(1)
    values = weight.index_select(dim, order[moved])   # scratch: only the rows that change place
    weight.transpose(0, dim)[moved] = values.transpose(0, dim)


_op = define("permute_(Tensor(a!) weight, Tensor order, int dim) -> ()",
             reference, lambda weight, order, dim: None)


def permute_(weight: Tensor,   # 1-D to 3-D, changed in place
             order: Tensor,    # [weight.shape[dim]], int64, a permutation
             dim: int) -> None:
    """weight := weight.index_select(dim, order), in place; rows that keep their place are not touched.

    Raises: ValueError for a wrong dim or an order that is no permutation, before anything is written.
    """
    if not (1 <= weight.dim() <= 3 and 0 <= dim < weight.dim()):
        raise ValueError(f"permute_: weight must have 1 to 3 dimensions and dim be one of them, "
                         f"got shape {tuple(weight.shape)} and dim {dim}")
    size = weight.shape[dim]
    if order.dtype != torch.int64 or order.shape != (size,):
        raise ValueError(f"permute_: order must be int64 of shape ({size},), "
                         f"got {order.dtype} of shape {tuple(order.shape)}")
    if not torch.compiler.is_compiling() and not torch.equal(order.sort().values, torch.arange(size, device=order.device)):
        raise ValueError(f"permute_: order is no permutation of 0..{size - 1}")
    _op(weight, order, dim)
    count_change(weight)
