"""A batch whose sequences name their adapters, each added to the base's output (paper, section 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from s2ft.ops._library import define

OP = "multi_adapter_linear"


def reference(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> Tensor:
    check_shapes(x, y, values, index, offsets, adapter, dim)
    if x.device.type != "cpu":
        return without_waiting(x, y, values, index, offsets, adapter, dim)
    check_entries(x, y, index, offsets, adapter, dim)
    out = y.clone(memory_format=torch.contiguous_format)
    for name in adapter.unique().tolist():
        if name < 0:
            continue
        begin, end = offsets[name].item(), offsets[name + 1].item()
        rows, units = (adapter == name).nonzero().squeeze(1), index[begin:end]
        if dim == 0:
            products = x[rows] @ values[begin:end].t()
            changed = out[rows].index_add(-1, units, products)
        else:
            changed = out[rows] + x[rows].index_select(-1, units) @ values[begin:end]
        out[rows] = changed
    return out


def without_waiting(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> Tensor:
    """The reference for a device that the host must not wait for: no size depends on what a tensor holds.

    Either every sequence is multiplied by all units of the bank, and what its adapter does not have is masked; or
    sequence by sequence the units of its adapter are gathered, as many as an adapter can have. The first reads the
    bank once for all sequences, the second does not grow with the bank. Entries out of range are skipped.
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
        some = (begin[one] + number[:most]).clamp(0, units - 1)
        mine = (number[:most] < end[one] - begin[one]) & known[one] & fits[some]
        _add(out[one : one + 1], x[one : one + 1], values[some], at[some], mine[None], dim)
    return out


PIECE = 2**24  # elements of an intermediate tensor
RIDGE = 256  # tokens for which a GPU multiplies by a matrix about as long as it reads it


def _add(
    out: Tensor,  # [B, ..., O], changed in place
    x: Tensor,  # [B, ..., I]
    values: Tensor,  # [n, I] for dim 0, [n, O] for dim 1
    at: Tensor,  # [n] int64, the output or input that each unit is
    mine: Tensor,  # [B, n] bool, which units each sequence's adapter has
    dim: int,
) -> None:
    """Add the units that each sequence's adapter has. Numbers of the others have no effect, not even inf and NaN."""
    shape = (len(mine), *[1] * (x.dim() - 2))
    others = ~mine.view(*shape, -1)
    if dim == 0:
        out.index_add_(-1, at, (x @ values.t()).masked_fill(others, 0))
        return
    broken = ~values.isfinite().all(1)  # zero times these would be NaN in every sequence
    out += x.index_select(-1, at).masked_fill(others, 0) @ values.masked_fill(broken[:, None], 0)
    out.masked_fill_((mine & broken).any(1).view(*shape, 1), float("nan"))


def check_shapes(
    x: Tensor, y: Tensor, values: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int
) -> None:
    if dim not in (0, 1) or x.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"{OP}: dim must be 0 or 1 and x and y be alike but for their last dimension, got dim {dim} "
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


def check_entries(x: Tensor, y: Tensor, index: Tensor, offsets: Tensor, adapter: Tensor, dim: int) -> None:
    limit, count = (y, x)[dim].shape[-1], offsets.numel() - 1
    for name in adapter.unique().tolist():
        if not -1 <= name < count:
            raise ValueError(f"{OP}: adapter has {name}, outside -1..{count - 1}")
        if name >= 0:
            begin, end = offsets[name].item(), offsets[name + 1].item()
            if not 0 <= begin <= end <= index.numel():
                raise ValueError(f"{OP}: offsets of adapter {name} are {begin} and {end}, outside 0..{index.numel()}")
            wrong = [unit for unit in index[begin:end].tolist() if not 0 <= unit < limit]
            if wrong:
                raise ValueError(f"{OP}: index has {wrong[0]}, outside 0..{limit - 1}")


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
    y: Tensor,  # [B, ..., O], the base's output for x
    values: Tensor,  # [U, I] if dim == 0 else [U, O]: a row for every unit of every adapter
    index: Tensor,  # [U] int64: the output (dim 0) or input (dim 1) that each unit is; none twice in an adapter
    offsets: Tensor,  # [A + 1] int64: adapter a has units offsets[a] to offsets[a + 1]
    adapter: Tensor,  # [B] int64: each sequence's adapter, -1 for none
    dim: int,
) -> Tensor:  # [B, ..., O]
    """y + x @ Δᵀ, where each of the B sequences has the delta Δ of the adapter it names.

    For dim 0, ``y[b, ..., index[u]] += x[b] · values[u]``; for dim 1, ``y[b] += x[b, ..., index[u]] * values[u]``
    over the units u of sequence b's adapter. Adapters may differ in size and none is padded; each is read once
    for all sequences that name it. :func:`pack_adapters` makes values, index and offsets. Sums are formed in
    float32 (float64 for float64); x, y and values have one dtype.

    Gradients flow to x and y; the bank is frozen. On CUDA entries out of range are skipped unseen, since
    looking would stall the device.
    Raises: ValueError for shapes that do not fit, an adapter, offset or index out of range, or a bank that
    requires a gradient; TypeError for mixed dtypes.
    """
    if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(y.dtype)
    if not x.dtype == y.dtype == values.dtype:
        raise TypeError(f"{OP}: x is {x.dtype}, y is {y.dtype} and values is {values.dtype}; give all one dtype")
    if values.requires_grad:
        raise ValueError(f"{OP}: values requires a gradient, but a bank is frozen: give values.detach()")
    if torch.compiler.is_compiling() or torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        return _op(x, y, values, index, offsets, adapter, dim)
    with torch._C._AutoDispatchBelowAutograd():  # no gradient: a third of the time of a small call
        return _op(x, y, values, index, offsets, adapter, dim)


def pack_adapters(
    deltas: Sequence[tuple[Tensor, Tensor]],  # of each adapter: index [n], delta
    dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """values, index and offsets of :func:`multi_adapter_linear`.

    A delta has shape [n, I] for dim 0 and [O, n] for dim 1, as an adapter of sliced_linear; all have one dtype.
    """
    rows = [delta if dim == 0 else delta.t() for _, delta in deltas]
    for (index, _), values in zip(deltas, rows):
        if index.shape != values.shape[:1]:
            raise ValueError(
                f"pack_adapters: index of shape {tuple(index.shape)} names another number of units than "
                f"delta has, {values.shape[0]}"
            )
    sizes = torch.tensor([0] + [len(index) for index, _ in deltas])
    device = rows[0].device
    return torch.cat(rows).contiguous(), torch.cat([index for index, _ in deltas]), sizes.cumsum(0).to(device)
