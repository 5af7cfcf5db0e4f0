"""Ops that change units of a weight in place: reorder them, add to them, exchange them, write base + delta."""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from s2ft.distributed import is_spread
from s2ft.ops._library import define, host_can_read

# ---- the memory of a weight -----------------------------------------------------------------------------------------

# Held while weights and what is kept of their base change. The same thread may take it again.
WRITING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no other thread that would finish a change and give the lock back
    os.register_at_fork(before=WRITING.acquire, after_in_parent=WRITING.release, after_in_child=WRITING.release)

MAPS = "/proc/self/maps"  # Linux only


def writing(op: str, reference: Callable) -> Callable:
    """Wrap the reference of an op that writes to its first argument.

    It raises ValueError for read-only memory of the CPU, where a write would end the process. The compiled kernels have
    a check of their own.
    """

    @wraps(reference)
    def run(weight: Tensor, *args) -> None:
        found = _mapping_of(weight)
        if found is not None and "w" not in found[0]:
            raise ValueError(
                f"{op}: weight is in read-only memory, such as a memmap of mode 'r', and this op writes to it: "
                "pass a copy, weight.clone()"
            )
        reference(weight, *args)

    return run


def check_private(what: str, weight: Tensor) -> None:
    """Check that `weight` is writable and that no other process shares its memory. This takes about 50 µs.

    Args:
        what: Name of the weight, for the message.
        weight: Any tensor. Only CPU memory is checked.

    Raises:
        ValueError: The tensor is in shared memory, a shared mapping of a file, or a read-only mapping.
    """
    found = _mapping_of(weight)
    if found is None:
        return
    flags, file = found
    where = f" ({file})" if file else ""
    if "w" not in flags:
        raise ValueError(
            f"{what} is in read-only memory{where}, and s2ft writes to the weights that it trains: load "
            "the model without a memory map, or clone the weight"
        )
    if "s" in flags:
        raise ValueError(
            f"{what} is in memory that is shared with other processes{where}. A weight holds base + delta, and they "
            "would compute with it too: give every process its own weights (clone them), and share only the trained s2"
        )


def give_own_memory(weight: Tensor) -> None:
    """Give a weight memory of its own, since torch.multiprocessing sends tensors in memory that processes share."""
    if weight.device.type == "cpu" and not is_spread(weight) and weight.is_shared():
        weight.data = weight.data.clone()


def _mapping_of(weight: Tensor) -> tuple[str, str] | None:
    """Return the flags, such as "rw-p", and the file of a CPU tensor's mapping, or None if they are unknown."""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return None
    if not sys.platform.startswith("linux"):
        return ("rw-s", "") if weight.is_shared() else None
    address = weight.data_ptr()
    with open(MAPS, encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, flags, *_, file = line.rstrip("\n").split(" ", 5)
            first, last = span.split("-")
            if int(first, 16) <= address < int(last, 16):
                return flags, file.strip()
    return None


# ---- numbers of units -----------------------------------------------------------------------------------------------


def is_being_captured(tensor: Tensor) -> bool:
    """Whether work on the tensor is recorded in a CUDA graph. The host can't wait then."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def check_index(op: str, index: Tensor, length: int, size: int) -> None:
    """Check that `index` is int64 of shape [length] with entries from 0 to size - 1.

    The entries are checked on the CPU only. On a GPU the check would wait for the device, and a fake tensor has none.

    Raises:
        ValueError: It is not.
    """
    if index.dtype != torch.int64 or index.shape != (length,):
        raise ValueError(
            f"{op}: index must be int64 of shape ({length},), got {index.dtype} of shape {tuple(index.shape)}"
        )
    if torch.compiler.is_compiling() or not host_can_read(index) or length == 0 or type(index) is not Tensor:
        return
    low, high = torch.aminmax(index)
    if low < 0 or high >= size:
        raise ValueError(f"{op}: index has {int(low if low < 0 else high)}, outside 0..{size - 1}")


def check_distinct(op: str, index: Tensor, size: int, name: str = "index") -> None:
    """Check that every entry of `index` is from 0 to size - 1 and none occurs twice. On a GPU this waits for it once.

    Public functions call it for a GPU, and references for the CPU. The compiled CPU kernels have a check of their own.
    A call that is captured in a CUDA graph can't wait and is not checked.

    Raises:
        ValueError: An entry is out of range, or occurs twice.
    """
    if torch.compiler.is_compiling() or index.numel() == 0 or is_being_captured(index):
        return
    ordered = index.sort().values
    repeats = ordered[1:] == ordered[:-1]
    low, high, repeated = torch.stack((ordered[0], ordered[-1], repeats.sum())).tolist()  # the only wait
    if low < 0 or high >= size:
        raise ValueError(f"{op}: {name} has {low if low < 0 else high}, outside 0..{size - 1}")
    if repeated:
        raise ValueError(f"{op}: {name} names unit {int(ordered[1:][repeats][0])} twice")


def check_dim(op: str, weight: Tensor, dim: int) -> None:
    if not (1 <= weight.dim() <= 3 and 0 <= dim < weight.dim()):
        raise ValueError(
            f"{op}: weight must have 1 to 3 dimensions and dim must be one of them, "
            f"got shape {tuple(weight.shape)} and dim {dim}"
        )


def check_movable(op: str, weight: Tensor, dim: int, index: Tensor, values: Tensor, name: str) -> None:
    """Check that `values` has the weight's shape, with as many units along dim as `index` has entries."""
    check_dim(op, weight, dim)
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{op}: index must be int64 with one dimension, got {index.dtype} of shape {tuple(index.shape)}"
        )
    shape = (*weight.shape[:dim], index.numel(), *weight.shape[dim + 1 :])
    if values.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(values.shape)}")


def count_change(*weights: Tensor) -> None:
    """Tell autograd that an op wrote to these tensors.

    A backward that saved one of them then raises instead of computing a wrong gradient.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([weight for weight in weights if not weight.is_inference()])


# ---- permute_ -------------------------------------------------------------------------------------------------------


def permute_reference(weight: Tensor, order: Tensor, dim: int) -> None:
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
    # only the units that move need scratch
    weight.transpose(0, dim)[moved] = weight.index_select(dim, order[moved]).transpose(0, dim)


PIECE = 2**25  # elements of the scratch memory


def _permute_whole(weight: Tensor, order: Tensor, dim: int) -> None:
    """Copy every unit, because the host can't know which ones move, in pieces along another dimension."""
    other = 1 if dim == 0 and weight.dim() > 1 else 0
    step = weight.shape[other] if weight.dim() == 1 else max(1, PIECE * weight.shape[other] // max(1, weight.numel()))
    for piece in weight.split(max(1, step), other):
        piece.copy_(piece.index_select(dim, order))


_permute = define(
    "permute_(Tensor(a!) weight, Tensor order, int dim) -> ()",
    writing("permute_", permute_reference),
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
    _permute(weight, order, dim)
    count_change(weight)


# ---- scatter_add_ ---------------------------------------------------------------------------------------------------


def check_scatter_add(
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


def scatter_add_reference(
    weight: Tensor, index: list[Tensor], delta: list[Tensor], dim: int, alpha: list[float], replaced: list[Tensor]
) -> None:
    check_scatter_add("scatter_add_", weight, index, delta, dim, alpha, replaced)
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
        total.transpose(0, dim)[at] = (total.index_select(dim, at) + factor * values.to(wide)).transpose(0, dim)
    if len(delta) > 1:
        total = total.index_select(dim, torch.searchsorted(units, units))
    # On the transpose the index is the first dimension, where torch writes whole rows at a time.
    weight.transpose(0, dim)[units] = total.to(weight.dtype).transpose(0, dim)


_scatter_add = define(
    "scatter_add_(Tensor(a!) weight, Tensor[] index, Tensor[] delta, int dim, float[] alpha, "
    "Tensor(b!)[] replaced) -> ()",
    writing("scatter_add_", scatter_add_reference),
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
    _scatter_add(weight, indices, deltas, dim, alphas, kept)
    count_change(weight, *kept)


def _as_list(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


# ---- swap_ ----------------------------------------------------------------------------------------------------------


def swap_reference(weight: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    check_movable("swap_", weight, dim, index, values, "values")
    if values.dtype != weight.dtype:
        raise ValueError(f"swap_: values must have weight's dtype {weight.dtype}, got {values.dtype}")
    if host_can_read(index):
        check_distinct("swap_", index, weight.shape[dim])
    held = weight.index_select(dim, index)
    # On the transpose the index is the first dimension, where torch writes whole rows at a time.
    weight.transpose(0, dim)[index] = values.transpose(0, dim)
    values.copy_(held)


_swap = define(
    "swap_(Tensor(a!) weight, Tensor index, Tensor(b!) values, int dim) -> ()",
    writing("swap_", swap_reference),
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
    _swap(weight, index, values, dim)
    count_change(weight, values)


# ---- write_slices_ --------------------------------------------------------------------------------------------------

# Start of a contiguous slice, or the index of every unit, int64 [n]
Units = int | Tensor


def effective_units(base: Tensor, delta: Tensor) -> Tensor:
    """Compute base + delta, summed in the wider dtype and rounded once to the dtype of base.

    Every effective weight is formed by this function or by its compiled equivalent. The weight used in training
    therefore equals, bit for bit, the weight that merging writes.

    Args:
        base: Base values of the selected units, any shape.
        delta: Trained update, with base's shape. Its dtype may be wider.

    Returns:
        The sum, in the dtype of base.

    Example:
        >>> base = torch.ones(2, dtype=torch.bfloat16)
        >>> s2ft.ops.effective_units(base, torch.tensor([0.5, 1e-4]))
        tensor([1.5000, 1.0000], dtype=torch.bfloat16)
    """
    return (base + delta).to(base.dtype)


class Slice(NamedTuple):
    """Units of one weight, and what is written there.

    Attributes:
        weight: The weight, or a view of it, as a matrix. It is changed in place.
        base: Values of the units, in the shape of `delta` and the dtype of `weight`.
        delta: What is added to them: [n, columns] if `dim` is 0, [rows, n] if `dim` is 1.
        units: The first of n neighbouring units, or an index [n] int64.
        dim: Dimension of the units: 0 for rows, 1 for columns.

    Example:
        >>> s2ft.ops.Slice(torch.zeros(3, 2), base=torch.ones(1, 2), delta=torch.ones(1, 2), units=1, dim=0).dim
        0
    """

    weight: Tensor
    base: Tensor
    delta: Tensor
    units: Units
    dim: int


def check_slice(one: Slice) -> None:
    op, weight, dim = "write_slices_", one.weight, one.dim
    if weight.dim() != 2 or dim not in (0, 1):
        raise ValueError(f"{op}: weight must be a matrix and dim 0 or 1, got shape {tuple(weight.shape)} and dim {dim}")
    length = one.delta.shape[dim] if one.delta.dim() == 2 else -1
    shape = (length, weight.shape[1]) if dim == 0 else (weight.shape[0], length)
    if one.delta.shape != shape:
        raise ValueError(
            f"{op}: delta of shape {tuple(one.delta.shape)} must fit weight of shape {tuple(weight.shape)}"
        )
    if one.base.shape != shape or one.base.dtype != weight.dtype:
        raise ValueError(
            f"{op}: base must have delta's shape {shape} and weight's dtype {weight.dtype}, got "
            f"{tuple(one.base.shape)} and {one.base.dtype}"
        )
    if isinstance(one.units, Tensor):
        check_index(op, one.units, length, weight.shape[dim])
    elif not 0 <= one.units <= one.units + length <= weight.shape[dim]:
        raise ValueError(f"{op}: slice {one.units}:{one.units + length} outside 0..{weight.shape[dim]}")


def write_slices_reference(weight, base, delta, index, start, dim):
    slices = [
        Slice(*rest, first if where is None else where, along)
        for *rest, where, first, along in zip(weight, base, delta, index, start, dim, strict=True)
    ]
    for one in slices:
        check_slice(one)
    for one in slices:
        sums = effective_units(one.base, one.delta)
        if isinstance(one.units, Tensor):  # on the transpose the index is the first dimension: torch writes whole rows
            one.weight.transpose(0, one.dim)[one.units] = sums.transpose(0, one.dim)
        else:
            one.weight.narrow(one.dim, one.units, sums.shape[one.dim]).copy_(sums)


_write_slices = define(
    "write_slices_(Tensor(a!)[] weight, Tensor[] base, Tensor[] delta, Tensor?[] index, int[] start, int[] dim) -> ()",
    write_slices_reference,
    lambda weight, base, delta, index, start, dim: None,
)


def write_slice(one: Slice) -> None:
    """Write one slice that requires no gradient, in half the time of the host that :func:`write_slices_` takes."""
    index, start = (one.units, 0) if isinstance(one.units, Tensor) else (None, one.units)
    _write_slices([one.weight], [one.base], [one.delta], [index], [start], [one.dim])


def write_slices_(slices: Sequence[Slice]) -> None:
    """Write base + delta into units of weights: ``weight[units] = base + delta``, in one pass for each device.

    Sums are formed in the wider dtype and rounded once, as by :func:`effective_units`. A graph of autograd that was
    recorded before stays valid: the weights' versions do not change. The caller checks that their memory is writable.

    Args:
        slices: The slices. On a GPU the entries of an index are not checked, because the host would wait.

    Raises:
        ValueError: A shape, a dtype or an index is wrong. Nothing has been written then.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> s2ft.ops.write_slices_([s2ft.ops.Slice(weight, torch.ones(1, 2), torch.ones(1, 2), 1, 0)])
        >>> weight.tolist()
        [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]
    """
    for device in {one.weight.device for one in slices}:
        here = [one for one in slices if one.weight.device == device]
        with torch.no_grad():
            _write_slices(
                [one.weight for one in here],
                [one.base for one in here],
                [one.delta for one in here],
                [one.units if isinstance(one.units, Tensor) else None for one in here],
                [0 if isinstance(one.units, Tensor) else one.units for one in here],
                [one.dim for one in here],
            )
