"""Add deltas to units of a weight in place, to switch and merge adapters (S²FT paper, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2ft.ops._library import check_distinct, check_movable, count_change, define, host_can_read
from s2ft.ops._memory import writing


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
            f"{op}: index, delta, alpha and replaced must have the same number of entries, got "
            f"{len(index)}, {len(delta)}, {len(alpha)} and {len(replaced)}"
        )
    for where, values in zip(index, delta):
        check_movable(op, weight, dim, where, values, "delta")
        if host_can_read(where):
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
    # A unit of several deltas occurs several times. All deltas add to its first place, from which all its places are
    # written. Removing the repeats would be a size that depends on values, for which the host would wait.
    units = torch.cat(list(index)).sort().values
    total = weight.index_select(dim, units).to(wide)
    for where, values, factor in zip(index, delta, alpha):
        at = torch.searchsorted(units, where)
        change = total.index_select(dim, at) + factor * values.to(wide)
        total.transpose(0, dim)[at] = change.transpose(0, dim)
    if len(delta) > 1:
        total = total.index_select(dim, torch.searchsorted(units, units))
    # On the transpose the index is the first dimension, where torch writes whole rows at a time.
    weight.transpose(0, dim)[units] = total.to(weight.dtype).transpose(0, dim)


_op = define(
    "scatter_add_(Tensor(a!) weight, Tensor[] index, Tensor[] delta, int dim, float[] alpha, "
    "Tensor(b!)[] replaced) -> ()",
    writing("scatter_add_", reference),
    lambda weight, index, delta, dim, alpha, replaced: None,
)


def scatter_add_(
    weight: Tensor,  # 1-D to 3-D, changed in place
    index: Tensor | Sequence[Tensor],  # [n] int64, no unit twice; or one per delta
    delta: Tensor | Sequence[Tensor],  # weight.shape with dim -> n; or a list, each with its own n
    dim: int,
    alpha: float | Sequence[float] = 1.0,
    replaced: Tensor | Sequence[Tensor] | None = None,  # delta's shape, weight's dtype
    *,
    is_checked: bool = False,
) -> None:
    """Add deltas to units of a weight in place: ``weight[index] += alpha * delta`` along `dim`.

    Lists are added in one pass. Sums are formed in float32, or in float64 if the weight or a delta has it. Products are
    rounded before they are added, and every element is rounded once to the weight's dtype, also if several deltas
    change it. One delta with alpha 1 therefore gives :func:`effective_units`, bit for bit. Subtracting the delta would
    not restore the old values exactly. To restore them, pass `replaced` and exchange it with :func:`swap_`
    (S²FT paper, section 3.4).

    Args:
        weight: Tensor with 1 to 3 dimensions, float32, float64, bfloat16 or float16. It is changed in place.
        index: Units of the weight, shape [n], int64, without duplicates. For several deltas, a list with one each.
        delta: Tensor with the weight's shape but n units along `dim`, or a list of such tensors.
        dim: Dimension of the units.
        alpha: Factor of the delta, or a list with one factor per delta. Default: 1.
        replaced: Tensor, or list of tensors, with delta's shape and the weight's dtype. It receives the old values.
            Default: they are not kept.
        is_checked: Whether the caller knows that the entries of each index are in range and distinct. On a GPU this
            check waits for the device. With entries that are not, the result is undefined. Default: they are checked.

    Raises:
        ValueError: `dim`, a shape, a dtype, a number of entries or an index is wrong. Nothing has been written then.
            A CUDA graph can't wait for this check, so a captured call leaves it out: call once before the capture.

    Example:
        >>> weight, old = torch.zeros(3, 2), torch.empty(1, 2)
        >>> s2ft.ops.scatter_add_(weight, torch.tensor([1]), torch.ones(1, 2), 0, alpha=0.5, replaced=old)
        >>> weight.tolist()
        [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]
        >>> s2ft.ops.swap_(weight, torch.tensor([1]), old, 0)  # the old weight, bit for bit
        >>> weight.any()
        tensor(False)
    """
    indices, deltas, kept = _as_list(index), _as_list(delta), [] if replaced is None else _as_list(replaced)
    alphas = [float(alpha)] * len(deltas) if isinstance(alpha, (int, float)) else [float(a) for a in alpha]
    if weight.is_cuda and not is_checked:
        for where in indices:
            check_distinct("scatter_add_", where, weight.shape[dim])
    if len({values.dtype for values in deltas}) > 1:
        wide = torch.float64 if any(values.dtype is torch.float64 for values in deltas) else torch.float32
        deltas = [values.to(wide) for values in deltas]
    _op(weight, indices, deltas, dim, alphas, kept)
    count_change(weight, *kept)


def _as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)
