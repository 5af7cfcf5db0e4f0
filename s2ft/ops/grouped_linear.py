"""Linear layers of a mixture of experts, whose only trainable weights are a few rows or columns of each expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from s2ft.ops._effective import with_effective_weight
from s2ft.ops._grouped import ALIGNMENT, grouped_outer, product
from s2ft.ops._library import autocast_input, check_index, define, is_being_captured
from s2ft.ops._linear import below_autograd

OP = "grouped_linear"


def check(x: Tensor, weight: Tensor, delta: Tensor, index: Tensor, offsets: Tensor, dim: int) -> None:
    """Check the arguments.

    Raises:
        ValueError: An argument is wrong. The message names it.
    """
    if dim not in (0, 1):
        raise ValueError(f"{OP}: dim must be 0 (outputs) or 1 (inputs), got {dim}")
    if weight.dim() != 3:
        raise ValueError(f"{OP}: weight must be [groups, outputs, inputs], got shape {tuple(weight.shape)}")
    if delta.dim() != 2 or delta.shape[1 - dim] != weight.shape[2 - dim]:
        raise ValueError(
            f"{OP}: delta of shape {tuple(delta.shape)} does not fit dim {dim} of weight of shape {tuple(weight.shape)}"
        )
    if x.dim() != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"{OP}: x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}")
    if offsets.dtype != torch.int32 or offsets.shape != weight.shape[:1]:
        raise ValueError(
            f"{OP}: offsets must be int32 of shape ({weight.shape[0]},), got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    check_index(OP, index, delta.shape[dim], weight.shape[0] * weight.shape[1 + dim])


def reference(x, weight, delta, index, most, offsets, dim, kept):
    check(x, weight, delta, index, offsets, dim)
    return with_effective_weight(
        weight, delta, index, dim, x.dtype, lambda effective: product(x, effective.transpose(1, 2), offsets)
    )


def reference_grad_x(grad, weight, delta, index, most, offsets, dim):
    return with_effective_weight(
        weight, delta, index, dim, grad.dtype, lambda effective: product(grad, effective, offsets)
    )


def fake(x, weight, delta, index, most, offsets, dim, kept):
    check(x, weight, delta, index, offsets, dim)
    return x.new_empty(x.shape[0], weight.shape[1])


def fake_grad_x(grad, weight, delta, index, most, offsets, dim):
    return grad.new_empty(grad.shape[0], weight.shape[2])


# ---- gradients -------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """The units of each group, with as many places for every group.

    Attributes:
        units: [groups, places] int64. A place without a unit has unit 0.
        places: Place of each entry of the index, counted through all groups, [n] int64; None if no place is empty.
    """

    units: Tensor
    places: Tensor | None


def _table(index: Tensor, most: int, groups: int, size: int, dtype: torch.dtype) -> _Table:
    """Make the table. Rows of `width` elements start at multiples of 16 bytes, as the grouped product needs it.

    Nothing here waits for the device.
    """
    step = ALIGNMENT // dtype.itemsize
    width = -(-most // step) * step
    units = index % size
    if index.shape[0] == groups * width:
        return _Table(units.view(groups, width), None)
    group = index // size
    first = torch.searchsorted(group, torch.arange(groups, device=index.device))
    places = group * width + torch.arange(index.shape[0], device=index.device) - first[group]
    table = index.new_zeros(groups * width).index_copy(0, places, units)
    return _Table(table.view(groups, width), places)


def _columns(x: Tensor, table: _Table, offsets: Tensor) -> Tensor:
    """The entries of x [T, size] at the units of each row's group: [T, places]."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    group = torch.searchsorted(offsets, rows, right=True).clamp_(max=offsets.shape[0] - 1)
    places = rows.long()[:, None] * x.shape[1] + table.units[group]
    return x.flatten().index_select(0, places.flatten()).view(places.shape)  # a gather keeps all of x for its backward


def columns_to_keep(x: Tensor, weight: Tensor, index: Tensor, most: int, offsets: Tensor) -> Tensor:
    """Copy the selected columns of x, which is all that the gradient of a delta of dim 1 needs of x."""
    return _columns(x, _table(index, most, weight.shape[0], weight.shape[2], x.dtype), offsets)


def delta_gradient(grad: Tensor, kept: Tensor, delta: Tensor, index, most, offsets, dim, groups, size) -> Tensor:
    """The gradient of delta. `kept` is all of x for dim 0, and its selected columns for dim 1."""
    table = _table(index, most, groups, size, grad.dtype)
    if dim == 0:
        sums = grouped_outer(_columns(grad, table, offsets), kept, offsets).flatten(0, 1)
    else:
        sums = grouped_outer(grad, kept, offsets).transpose(0, 1).flatten(1)
    if table.places is not None:
        sums = sums.index_select(dim, table.places)
    return sums.to(delta.dtype)


def _keep_for_backward(ctx, inputs, output):
    x, weight, delta, index, ctx.most, offsets, ctx.dim, kept = inputs
    if not ctx.needs_input_grad[2]:
        kept = None
    elif ctx.dim == 0:
        kept = x
    elif kept is None:
        raise ValueError(
            "kept, the selected columns of x, must be given when dim is 1 and delta needs a gradient: call "
            "s2ft.ops.grouped_linear, which makes it"
        )
    ctx.save_for_backward(kept, weight, delta, index, offsets)


def _backward(ctx, grad):
    kept, weight, delta, index, offsets = ctx.saved_tensors
    grad_x = grad_delta = None
    if ctx.needs_input_grad[0]:
        grad_x = below_autograd(_grad_x, grad, weight, delta, index, ctx.most, offsets, ctx.dim)
    if ctx.needs_input_grad[2]:
        sizes = weight.shape[0], weight.shape[1 + ctx.dim]
        grad_delta = delta_gradient(grad, kept, delta, index, ctx.most, offsets, ctx.dim, *sizes)
    return grad_x, None, grad_delta, None, None, None, None, None


def _keep_for_second_backward(ctx, inputs, output):
    grad, weight, delta, index, ctx.most, offsets, ctx.dim = inputs
    ctx.save_for_backward(grad, weight, delta, index, offsets)


def _second_backward(ctx, second):  # [T, I], the gradient with respect to grad_x
    grad, weight, delta, index, offsets = ctx.saved_tensors
    grad_grad = grad_delta = None
    if ctx.needs_input_grad[0]:
        grad_grad = _call(second, weight, delta, index, ctx.most, offsets, ctx.dim)
    if ctx.needs_input_grad[2]:
        sizes = weight.shape[0], weight.shape[1 + ctx.dim]
        kept = second if ctx.dim == 0 else _columns(second, _table(index, ctx.most, *sizes, second.dtype), offsets)
        grad_delta = delta_gradient(grad, kept, delta, index, ctx.most, offsets, ctx.dim, *sizes)
    return grad_grad, None, grad_delta, None, None, None, None


_op = define(
    f"{OP}(Tensor x, Tensor weight, Tensor delta, Tensor index, int most, Tensor offsets, int dim, Tensor? kept) "
    "-> Tensor",
    reference,
    fake,
    _keep_for_backward,
    _backward,
)
_grad_x = define(
    f"{OP}_grad_x(Tensor grad, Tensor weight, Tensor delta, Tensor index, int most, Tensor offsets, int dim) -> Tensor",
    reference_grad_x,
    fake_grad_x,
    _keep_for_second_backward,
    _second_backward,
)


def _call(x: Tensor, weight: Tensor, delta: Tensor, index: Tensor, most: int, offsets: Tensor, dim: int) -> Tensor:
    """Call the op with what its backward needs of x, see :func:`s2ft.ops._linear.call`."""
    kept = None
    if dim == 1 and delta.requires_grad and torch.is_grad_enabled():
        check(x, weight, delta, index, offsets, dim)
        kept = columns_to_keep(x, weight, index, most, offsets)
    return _op(x, weight, delta, index, most, offsets, dim, kept)


def grouped_linear(
    x: Tensor,  # [T, I], rows of one group together
    weight: Tensor,  # [groups, O, I], frozen
    delta: Tensor,  # [n, I] if dim == 0 else [O, n]
    index: Tensor,  # [n], int64, ascending groups, no unit twice
    offsets: Tensor,  # [groups], int32
    dim: int,
    most: int | None = None,
) -> Tensor:  # [T, O]
    """Multiply the rows of x by the weight of their group, with `delta` added to some units of the weights.

    This is a layer of a mixture of experts: a group is an expert, and its rows are the tokens that it gets. All groups
    are one product, and the host waits for no result of the device. The contract is that of
    :func:`s2ft.ops.sliced_linear`: the weight holds base + delta during the call and has its old bits afterwards, and
    gradients of any order flow to x and delta, never to weight (S²FT paper, section 3.3).

    PyTorch's product of all groups takes float32, bfloat16 and float16 and rows of whole 16 bytes. A loop over the
    groups does the rest on a CPU, and products of blocks of rows do it on a GPU. There, PyTorch's product waits for
    the device unless it computes bfloat16 on compute capability 9 or 10. Blocks replace it in a CUDA graph, and where
    there are at most as many rows as groups.

    Args:
        x: Input, shape [T, I]. The rows of group 0 come first. Under autocast it is cast to autocast's dtype.
        weight: Frozen weights, shape [groups, O, I], float32, float64, bfloat16 or float16. The two last dimensions may
            be the transposed view of weights that are stored as [groups, I, O].
        delta: Trained update of n units, shape [n, I] if dim is 0, else [O, n]. Its dtype may be wider than the
            weight's.
        index: The units, shape [n], int64, without duplicates: unit u of group g is g * U + u, where U is the number
            of units of one group, O if dim is 0, else I. The units of one group stand together, in the order of groups.
        offsets: Row of x where each group ends, shape [groups], int32. Rows after the last group get an undefined
            result.
        dim: 0 if the units are outputs, 1 if they are inputs.
        most: Largest number of units that one group has. Default: it is counted, which waits for a GPU.

    Returns:
        The output, shape [T, O], in the dtype of x, or in autocast's dtype.

    Raises:
        ValueError: A shape, `dim`, `offsets` or `index` is wrong, or `most` is missing in a CUDA graph.
        TypeError: x and weight differ in dtype outside autocast.

    Example:
        >>> x, weight = torch.ones(3, 2), torch.zeros(2, 4, 2)
        >>> delta, index = torch.ones(1, 2, requires_grad=True), torch.tensor([4 + 3])  # unit 3 of group 1
        >>> y = s2ft.ops.grouped_linear(x, weight, delta, index, torch.tensor([1, 3], dtype=torch.int32), dim=0)
        >>> y.tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 2.0]]
    """
    x = autocast_input(OP, x, weight)
    if most is None:
        check(x, weight, delta, index, offsets, dim)
        if is_being_captured(index):
            raise ValueError(f"{OP}: counting most waits for the GPU, which a CUDA graph can't: give most")
        counts = torch.bincount(index // weight.shape[1 + dim], minlength=1)
        most = int(counts.max())
    return _call(x, weight, delta, index, most, offsets, dim)
