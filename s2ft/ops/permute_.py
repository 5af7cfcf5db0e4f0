"""Reorder rows or columns of a weight in place: co-permutation (paper, section 3.2)."""

import torch
from torch import Tensor

from s2ft.ops._effective import in_turn
from s2ft.ops._library import check_dim, check_distinct, count_change, define


def reference(weight: Tensor, order: Tensor, dim: int) -> None:
    check_dim("permute_", weight, dim)
    size = weight.shape[dim]
    if order.dtype != torch.int64 or order.shape != (size,):
        raise ValueError(
            f"permute_: order must be int64 of shape ({size},), got {order.dtype} of shape {tuple(order.shape)}"
        )
    check_distinct("permute_", order, size, name="order")
    moved = (order != torch.arange(order.numel(), device=order.device)).nonzero().squeeze(1)
    values = weight.index_select(dim, order[moved])  # scratch: only the rows that change place
    weight.transpose(0, dim)[moved] = values.transpose(0, dim)


_op = define(
    "permute_(Tensor(a!) weight, Tensor order, int dim) -> ()",
    in_turn("permute_", reference),
    lambda weight, order, dim: None,
)


def permute_(
    weight: Tensor,  # 1-D to 3-D, changed in place
    order: Tensor,  # [weight.shape[dim]], int64, a permutation
    dim: int,
) -> None:
    """weight := weight.index_select(dim, order), in place.

    ``permute_(weight, order.argsort(), dim)`` is the inverse. Units that keep their place cost next to
    nothing; scratch is one row for each thread at most (on CUDA 16 MiB).
    Raises: ValueError for a wrong dim or an order that is no permutation, before anything is written.
    """
    if weight.is_cuda:
        check_distinct("permute_", order, weight.shape[dim], name="order")
    _op(weight, order, dim)
    count_change(weight)
