"""Add deltas to rows or columns of a weight in place: how adapters are fused (paper, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2ft.ops._effective import in_turn
from s2ft.ops._library import check_distinct, check_movable, count_change, define


def check(
    op: str,
    weight: Tensor,
    index: list[Tensor],
    delta: list[Tensor],
    dim: int,
    alpha: list[float],
    replaced: list[Tensor],
) -> None:
    if not len(index) == len(delta) == len(alpha) or len(replaced) not in (0, len(delta)):
        raise ValueError(
            f"{op}: index, delta, alpha and replaced must be as many, got {len(index)}, {len(delta)}, "
            f"{len(alpha)} and {len(replaced)}"
        )
    for where, values in zip(index, delta):
        check_movable(op, weight, dim, where, values, "delta")
        check_distinct(op, where, weight.shape[dim])
    for where, old in zip(index, replaced):
        check_movable(op, weight, dim, where, old, "replaced")
        if old.dtype != weight.dtype:
            raise ValueError(f"{op}: replaced must have weight's dtype {weight.dtype}, got {old.dtype}")


def reference(
    weight: Tensor, index: list[Tensor], delta: list[Tensor], dim: int, alpha: list[float], replaced: list[Tensor]
) -> None:
    check("scatter_add_", weight, index, delta, dim, alpha, replaced)
    if not delta:
        return
    for where, old in zip(index, replaced):
        old.copy_(weight.index_select(dim, where))
    wide = torch.promote_types(torch.promote_types(weight.dtype, delta[0].dtype), torch.float32)
    units = torch.cat(list(index)).unique()
    total = weight.index_select(dim, units).to(wide)
    for where, values, factor in zip(index, delta, alpha):
        at = torch.searchsorted(units, where)
        change = total.index_select(dim, at) + factor * values.to(wide)
        total.transpose(0, dim)[at] = change.transpose(0, dim)
    # On the transpose the index comes first, where torch writes whole rows at a time.
    weight.transpose(0, dim)[units] = total.to(weight.dtype).transpose(0, dim)


_op = define(
    "scatter_add_(Tensor(a!) weight, Tensor[] index, Tensor[] delta, int dim, float[] alpha, "
    "Tensor(b!)[] replaced) -> ()",
    in_turn("scatter_add_", reference),
    lambda weight, index, delta, dim, alpha, replaced: None,
)


def scatter_add_(
    weight: Tensor,  # 1-D to 3-D, changed in place
    index: Tensor | Sequence[Tensor],  # [n] int64, no unit twice; or one for each delta
    delta: Tensor | Sequence[Tensor],  # weight.shape with dim -> n; or several of any n
    dim: int,
    alpha: float | Sequence[float] = 1.0,
    replaced: Tensor | Sequence[Tensor] | None = None,  # as delta, in weight's dtype
) -> None:
    """``weight[index] += alpha * delta`` along dim; for lists, the sum of all of them in one pass.

    Sums are formed in float32 (float64 where weight or delta is), products rounded before they are added,
    and each touched element is rounded once to the weight's dtype, also where several deltas meet. So one
    delta with alpha 1 gives :func:`effective_units` bit for bit. Subtracting does not undo the change exactly:
    give `replaced`, which receives the units as they were before anything was added, and :func:`swap_` it back.

    Raises: ValueError for a wrong dim, shape, dtype, number or index, before anything is written.
    """
    indices, deltas, kept = _as_list(index), _as_list(delta), [] if replaced is None else _as_list(replaced)
    alphas = [float(alpha)] * len(deltas) if isinstance(alpha, (int, float)) else [float(a) for a in alpha]
    if weight.is_cuda:
        for where in indices:
            check_distinct("scatter_add_", where, weight.shape[dim])
    if len({values.dtype for values in deltas}) > 1:
        wide = torch.float64 if any(values.dtype is torch.float64 for values in deltas) else torch.float32
        deltas = [values.to(wide) for values in deltas]
    _op(weight, indices, deltas, dim, alphas, kept)
    count_change(weight, *kept)


def _as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
