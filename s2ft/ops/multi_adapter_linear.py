"""Add the adapter of each sequence of a batch to the base's output (S²FT paper, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2ft.ops._library import below_autograd, define, host_can_read, without_autocast

OP = "multi_adapter_linear"


def reference(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> Tensor:
    check_shapes(x, y, values, index, offsets, adapter, dim)
    if not host_can_read(adapter):
        return without_waiting(x, y, values, index, offsets, adapter, dim)
    out, limit, count = y.clone(memory_format=torch.contiguous_format), (y, x)[dim].shape[-1], offsets.numel() - 1
    for name in adapter.unique().tolist():
        if not -1 <= name < count:
            raise ValueError(f"{OP}: adapter has {name}, outside -1..{count - 1}")
        if name == -1:
            continue
        begin, end = offsets[name].item(), offsets[name + 1].item()
        if not 0 <= begin <= end <= index.numel():
            raise ValueError(f"{OP}: offsets of adapter {name} are {begin} and {end}, outside 0..{index.numel()}")
        rows, units = (adapter == name).nonzero().squeeze(1), index[begin:end]
        wrong = [unit for unit in units.tolist() if not 0 <= unit < limit]
        if wrong:
            raise ValueError(f"{OP}: index has {wrong[0]}, outside 0..{limit - 1}")
        if dim == 0:
            changed = out[rows].index_add(-1, units, x[rows] @ values[begin:end].t())
        else:
            changed = out[rows] + x[rows].index_select(-1, units) @ values[begin:end]
        out[rows] = changed
    return out


def without_waiting(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> Tensor:
    """The reference for devices on which the host must not wait: no size depends on the values in a tensor.

    It computes in one of two ways. Either it multiplies every sequence by all units of the bank and masks the units
    that the sequence's adapter does not have. Or it gathers, sequence by sequence, the units of the adapter, as many as
    an adapter can have. The first way reads the bank once for all sequences; the cost of the second does not grow with
    the bank. Entries out of range are skipped.
    """
    out = y.clone(memory_format=torch.contiguous_format)
    units, adapters, limit = index.numel(), offsets.numel() - 1, (y, x)[dim].shape[-1]
    if not (units and adapters and x.numel() and y.numel()):
        return out
    known, name = (adapter >= 0) & (adapter < adapters), adapter.clamp(0, adapters - 1)
    begin, end = offsets[name], offsets[name + 1]
    known = known & (begin >= 0) & (begin <= end) & (end <= units)  # [B]
    at, fits = index.clamp(0, limit - 1), (index >= 0) & (index < limit)  # [U]
    most, tokens, number = min(units, limit), x[..., 0].numel(), torch.arange(units, device=x.device)
    of_each = tokens // x.shape[0]
    if units * (1 + tokens / RIDGE) <= x.shape[0] * most * (3 + of_each / RIDGE):  # a gathered unit moves three times
        step = max(1, min(PIECE // tokens, 4 * PIECE // values.shape[1]))
        for some in (slice(first, first + step) for first in range(0, units, step)):
            mine = (number[some] >= begin[:, None]) & (number[some] < end[:, None]) & known[:, None] & fits[some]
            _add(out, x, values[some], at[some], mine, dim)
        return out
    for one in range(x.shape[0]):
        chosen = (begin[one] + number[:most]).clamp(0, units - 1)
        mine = (number[:most] < end[one] - begin[one]) & known[one] & fits[chosen]
        _add(out[one : one + 1], x[one : one + 1], values[chosen], at[chosen], mine[None], dim)
    return out


PIECE = 2**24  # elements of an intermediate tensor
RIDGE = 256  # number of tokens at which a GPU takes as long to multiply by a matrix as to read it


def _add(
    out: Tensor,  # [B, ..., O], changed in place
    x: Tensor,  # [B, ..., I]
    values: Tensor,  # [n, I] for dim 0, [n, O] for dim 1
    at: Tensor,  # [n] int64, the output or input of each unit
    mine: Tensor,  # [B, n] bool: True if the sequence's adapter has the unit
    dim: int,
) -> None:
    """Add the units of each sequence's adapter. The values of other units have no effect, not even inf and NaN."""
    shape = (len(mine), *[1] * (x.dim() - 2))
    not_mine = ~mine.view(*shape, -1)
    if dim == 0:
        out.index_add_(-1, at, (x @ values.t()).to(out.dtype).masked_fill(not_mine, 0))  # autocast may round it
        return
    broken = ~values.isfinite().all(1)  # zero times these would be NaN in every sequence
    out += x.index_select(-1, at).masked_fill(not_mine, 0) @ values.masked_fill(broken[:, None], 0)
    out.masked_fill_((mine & broken).any(1).view(*shape, 1), float("nan"))


def check_shapes(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> None:
    if dim not in (0, 1) or x.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{OP}: dim must be 0 or 1, and x and y must have one shape up to their last dimension, got dim {dim} "
            f"and shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if values.dim() != 2 or values.shape[1] != (x, y)[dim].shape[-1] or index.shape != values.shape[:1]:
        raise ValueError(
            f"{OP}: values must have shape (units, {(x, y)[dim].shape[-1]}) and index (units,), "
            f"got {tuple(values.shape)} and {tuple(index.shape)}"
        )
    if adapter.shape != x.shape[:1] or offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(
            f"{OP}: adapter must have shape ({x.shape[0]},) and offsets one dimension, "
            f"got {tuple(adapter.shape)} and {tuple(offsets.shape)}"
        )


def fake(x, y, values, index, offsets, adapter, dim):
    return y.new_empty(y.shape)


def setup_context(ctx, inputs, output):
    x, y, values, index, offsets, adapter, dim = inputs
    ctx.dim = dim
    ctx.save_for_backward(x, values, index, offsets, adapter)


def backward(ctx, grad):
    x, values, index, offsets, adapter = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:  # the op of the other dim is this one's transpose
        grad_x = torch.ops.s2ft.multi_adapter_linear(
            grad, torch.zeros_like(x), values, index, offsets, adapter, 1 - ctx.dim
        )
    return grad_x, grad, None, None, None, None, None


_op = define(
    f"{OP}(Tensor x, Tensor y, Tensor values, Tensor index, Tensor offsets, Tensor adapter, int dim) -> Tensor",
    reference,
    fake,
    setup_context,
    backward,
)


def multi_adapter_linear(
    x: Tensor,  # [B, ..., I]
    y: Tensor,  # [B, ..., O], the base's output
    values: Tensor,  # [U, I] if dim == 0 else [U, O], one row per unit of every adapter
    index: Tensor,  # [U] int64, the output (dim 0) or input (dim 1) of each unit
    offsets: Tensor,  # [A + 1] int64, where the units of each adapter start
    adapter: Tensor,  # [B] int64, the adapter of each sequence, -1 for none
    dim: int,
) -> Tensor:  # [B, ..., O]
    """Add to each sequence's output the delta of the sequence's adapter: ``y + x @ delta.t()``.

    For dim 0 this is ``y[b, ..., index[u]] += x[b] · values[u]``, and for dim 1 ``y[b] += x[b, ..., index[u]] *
    values[u]``, over the units u of sequence b's adapter. Adapters may differ in size, and none is padded. Sums are
    formed in float32, or in float64 for float64 tensors. Gradients flow to x and y; the adapters are frozen (S²FT
    paper, section 3.4).

    Args:
        x: Input of the layer, shape [B, ..., I].
        y: The base's output for x, shape [B, ..., O].
        values: Deltas of all adapters, one row per unit, shape [U, I] if dim is 0, else [U, O].
            :func:`pack_adapters` makes values, index and offsets.
        index: The output (dim 0) or input (dim 1) of each unit, shape [U], int64, without duplicates in an adapter.
        offsets: Where the adapters' units start, shape [A + 1], int64. Adapter a has the units from offsets[a] to
            offsets[a + 1] - 1.
        adapter: The adapter of each sequence, shape [B], int64. -1 means no adapter.
        dim: 0 if the units are outputs, 1 if they are inputs.

    Returns:
        The sum, shape [B, ..., O], in the dtype of y.

    Raises:
        ValueError: Shapes do not fit, `values` requires a gradient, or an adapter, offset or index is out of range. On
            CUDA an entry out of range is skipped, because a check would stall the device.
        TypeError: x, y and values differ in dtype.

    Example:
        >>> one, two = (torch.tensor([0]), torch.ones(1, 3)), (torch.tensor([0, 1]), torch.ones(2, 3))
        >>> bank = s2ft.ops.pack_adapters([one, two], dim=0)
        >>> x, y = torch.ones(3, 1, 3), torch.zeros(3, 1, 2)
        >>> s2ft.ops.multi_adapter_linear(x, y, *bank, torch.tensor([1, 0, -1]), dim=0).tolist()
        [[[3.0, 3.0]], [[3.0, 0.0]], [[0.0, 0.0]]]
    """
    if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(y.dtype)
    if not x.dtype == y.dtype == values.dtype:
        raise TypeError(f"{OP}: x is {x.dtype}, y is {y.dtype} and values is {values.dtype}; give all one dtype")
    if values.requires_grad:
        raise ValueError(f"{OP}: values requires a gradient, but a bank is frozen: pass values.detach()")
    with without_autocast(x):
        return below_autograd(_op, x, y, values, index, offsets, adapter, dim)


def pack_adapters(
    deltas: Sequence[tuple[Tensor, Tensor]],  # of each adapter: index [n] and delta
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack the deltas of several adapters for :func:`multi_adapter_linear`.

    Args:
        deltas: Index and delta of each adapter. An index has shape [n], int64; a delta has shape [n, I] if dim is 0,
            else [O, n]. n may differ between adapters. All deltas have one dtype and device.
        dim: 0 if the units are outputs, 1 if they are inputs.

    Returns:
        values [U, I] or [U, O], index [U] and offsets [A + 1], where U is the number of all units.

    Raises:
        ValueError: An index and its delta have different numbers of units.

    Example:
        >>> deltas = [(torch.tensor([5]), torch.ones(4, 1)), (torch.tensor([0, 2]), torch.ones(4, 2))]
        >>> values, index, offsets = s2ft.ops.pack_adapters(deltas, dim=1)
        >>> values.shape, index.tolist(), offsets.tolist()
        (torch.Size([3, 4]), [5, 0, 2], [0, 1, 3])
    """
    rows = [delta if dim == 0 else delta.t() for _, delta in deltas]
    for (index, _), values in zip(deltas, rows):
        if index.shape != values.shape[:1]:
            raise ValueError(
                f"pack_adapters: index must have shape ({values.shape[0]},), one entry per unit of its delta, "
                f"got {tuple(index.shape)}"
            )
    sizes = torch.tensor([0] + [len(index) for index, _ in deltas])
    return torch.cat(rows).contiguous(), torch.cat([index for index, _ in deltas]), sizes.cumsum(0).to(rows[0].device)
