"""Reorder the units of a weight in place, for co-permutation (S²FT paper, section 3.2)."""

import torch
from torch import Tensor

from s2ft.ops._library import check_dim, check_distinct, count_change, define, host_can_read
from s2ft.ops._memory import writing


def reference(weight: Tensor, order: Tensor, dim: int) -> None:
    check_dim("permute_", weight, dim)
    size = weight.shape[dim]
    if order.dtype != torch.int64 or order.shape != (size,):
        raise ValueError(
            f"permute_: order must be int64 of shape ({size},), got {order.dtype} of shape {tuple(order.shape)}"
        )
    if not host_can_read(order):
        return _permute_whole(weight, order, dim)
    check_distinct("permute_", order, size, name="order")
    moved = (order != torch.arange(order.numel(), device=order.device)).nonzero().squeeze(1)
    values = weight.index_select(dim, order[moved])  # only the units that move need scratch
    weight.transpose(0, dim)[moved] = values.transpose(0, dim)


PIECE = 2**25  # elements of the scratch memory


def _permute_whole(weight: Tensor, order: Tensor, dim: int) -> None:
    """Copy every unit, because the host can't know which ones move, in pieces along another dimension."""
    other = 1 if dim == 0 and weight.dim() > 1 else 0
    step = weight.shape[other] if weight.dim() == 1 else max(1, PIECE * weight.shape[other] // max(1, weight.numel()))
    for piece in weight.split(max(1, step), other):
        piece.copy_(piece.index_select(dim, order))


_op = define(
    "permute_(Tensor(a!) weight, Tensor order, int dim) -> ()",
    writing("permute_", reference),
    lambda weight, order, dim: None,
)


def permute_(
    weight: Tensor,  # 1-D to 3-D, changed in place
    order: Tensor,  # [weight.shape[dim]], int64, a permutation
    dim: int,
) -> None:
    """Reorder the units of a weight in place: ``weight[:] = weight.index_select(dim, order)``.

    ``permute_(weight, order.argsort(), dim)`` is the inverse. Units that keep their place cost almost nothing. The
    scratch memory is at most one row per thread, or 16 MiB on CUDA (S²FT paper, section 3.2).

    Args:
        weight: Tensor with 1 to 3 dimensions, any dtype of 1, 2, 4 or 8 bytes. It is changed in place.
        order: Permutation of the units, shape [weight.shape[dim]], int64. Unit order[i] moves to place i.
        dim: Dimension to reorder.

    Raises:
        ValueError: `dim` is wrong or `order` is not a permutation. Nothing has been written then.
            A CUDA graph can't wait for this check, so a captured call leaves it out: call once before the capture.

    Example:
        >>> weight = torch.arange(6).reshape(3, 2)
        >>> s2ft.ops.permute_(weight, torch.tensor([2, 0, 1]), 0)
        >>> weight.tolist()
        [[4, 5], [0, 1], [2, 3]]
    """
    if weight.is_cuda:
        check_distinct("permute_", order, weight.shape[dim], name="order")
    _op(weight, order, dim)
    count_change(weight)
