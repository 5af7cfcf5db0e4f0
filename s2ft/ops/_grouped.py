"""Products of groups of rows with one matrix each: what a mixture of experts does with its tokens.

Rows are sorted by group. `offsets` [groups] int32 has the end of each group, and rows after the last group belong to
none: their result is undefined. PyTorch has one kernel for all groups. It takes float32, bfloat16 and float16 and needs
rows and matrices that start at multiples of 16 bytes. On a CPU a loop over the groups does the rest. On a GPU a loop
would wait for the sizes of the groups, so blocks of rows do it: a block has rows of one group only, and the number of
blocks is known without the sizes.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._library import below_autograd, define, host_can_read
from s2ft.ops.in_place import is_being_captured
from s2ft.ops.sliced import ALIGNMENT


def takes(tensor: Tensor) -> bool:
    """Whether PyTorch's grouped product takes this operand, a matrix or a stack of them."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or tensor.data_ptr() % ALIGNMENT:
        return False
    others = [stride for stride in tensor.stride()[-2:] if stride != 1]
    return len(others) < 2 and 0 not in tensor.shape[-2:] and not any(s * tensor.itemsize % ALIGNMENT for s in others)


def product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows x [T, A] by the matrix of their group: weights [groups, A, B] → [T, B]."""
    x = x.contiguous()
    if takes(x) and takes(weights) and _prefers_one_product(x, weights.shape[0]):
        return F.grouped_mm(x, weights, offs=offsets).contiguous()  # its rows may be padded to 16 bytes
    if not host_can_read(offsets):
        return product_in_blocks(x, weights, offsets)
    y = x.new_zeros(x.shape[0], weights.shape[2])
    begin = 0
    for group, end in enumerate(offsets.tolist()):
        if end > begin:
            y[begin:end] = x[begin:end] @ weights[group]
            begin = end
    return y


def outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Sum the outer products of the rows of each group: a [T, A], b [T, B] → [groups, A, B]."""
    a, b = a.contiguous(), b.contiguous()
    if takes(a) and takes(b) and _prefers_one_product(a, offsets.shape[0]):
        sums = F.grouped_mm(a.t(), b, offs=offsets)
        # On compute capability 10 a group without rows gets what the accumulator held before: pytorch#172439.
        is_empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        return sums.masked_fill_(is_empty[:, None, None], 0)
    if not host_can_read(offsets):
        return outer_in_blocks(a, b, offsets)
    sums = a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1])
    begin = 0
    for group, end in enumerate(offsets.tolist()):
        if end > begin:
            sums[group] = a[begin:end].t() @ b[begin:end]
            begin = end
    return sums


def _prefers_one_product(x: Tensor, groups: int) -> bool:
    """Whether PyTorch's grouped product is the better one of those that can compute this.

    Its kernel for all groups is for bfloat16 on compute capability 9 and 10. On other GPUs PyTorch waits for the
    offsets and calls one product for each group, also for groups without rows.
    """
    if not x.is_cuda or x.dtype is torch.bfloat16 and _major_capability(x.device) in (9, 10):
        return True
    # A block copies its matrix, which moves three times as much memory as a product. One product for each group is
    # therefore better for many rows, and costs a wait.
    return x.shape[0] > groups and not is_being_captured(x)


@cache  # PyTorch asks for it anew, in each product
def _major_capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


# ---- blocks of rows --------------------------------------------------------------------------------------

PIECE = 2**26  # elements of an intermediate tensor


class _Blocks(NamedTuple):
    """Rows divided into blocks of one height, so that all rows of a block belong to one group.

    Attributes:
        group: Group of each block, [blocks] int64. A block that is not needed has any group.
        rows: Rows of each block, [blocks, height] int64, in range also where there is none.
        used: True where there is a row, [blocks, height].
        places: Place of each row, counted through all blocks, [T] int64.
    """

    group: Tensor
    rows: Tensor
    used: Tensor
    places: Tensor


def _blocks(rows: int, offsets: Tensor) -> _Blocks:
    """Divide rows into blocks. The number of blocks depends on shapes only: nothing here waits for the device."""
    groups, device = offsets.shape[0], offsets.device
    height = min(128, max(16, 1 << (rows // groups).bit_length()))
    count = rows // height + min(rows, groups)  # each group has at most one block that is not full
    ends = offsets.long()
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    blocks_of = (ends - begins + height - 1) // height
    last = blocks_of.cumsum(0)  # the number of blocks up to and with each group
    first = last - blocks_of

    number = torch.arange(count, device=device)
    group = torch.searchsorted(last, number, right=True).clamp_(max=groups - 1)
    of_block = (begins[group] + (number - first[group]) * height)[:, None] + torch.arange(height, device=device)
    used = of_block < ends[group][:, None]

    row = torch.arange(rows, device=device)
    own = torch.searchsorted(ends, row, right=True).clamp_(max=groups - 1)
    places = (first[own] * height + row - begins[own]).clamp_(max=count * height - 1)
    return _Blocks(group, of_block.clamp_(max=rows - 1), used, places)


def _pieces(blocks: _Blocks, elements: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Split groups, rows and used entries, so that no piece needs much more than PIECE elements."""
    step = max(1, PIECE // max(1, elements))
    return list(zip(blocks.group.split(step), blocks.rows.split(step), blocks.used.split(step)))


def product_in_blocks(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The same as :func:`product`, for every dtype and size, without waiting for the device."""
    if 0 in (*x.shape, *weights.shape):
        return x.new_zeros(x.shape[0], weights.shape[2])
    blocks = _blocks(x.shape[0], offsets)
    parts = [
        torch.bmm(x[rows], weights.index_select(0, group)).flatten(0, 1)
        for group, rows, _ in _pieces(blocks, weights[0].numel())
    ]
    return torch.cat(parts).index_select(0, blocks.places)


def outer_in_blocks(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """The same as :func:`outer`, for every dtype and size, without waiting for the device.

    The sums of blocks are added in float32 or wider, by index_put_, which adds in the same order every time.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    sums = a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1], dtype=wide)
    if 0 in (*a.shape, *b.shape, *offsets.shape):
        return sums.to(a.dtype)
    for group, rows, used in _pieces(_blocks(a.shape[0], offsets), sums[0].numel()):
        unused = ~used[:, :, None]  # zero in both, because zero times infinity is NaN
        products = torch.bmm(a[rows].masked_fill(unused, 0).mT, b[rows].masked_fill(unused, 0))
        sums.index_put_((group,), products.to(wide), accumulate=True)
    return sums.to(a.dtype)


def _save_product(ctx, inputs, output):
    x, weights, offsets = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, offsets)


def _product_backward(ctx, grad):
    x, weights, offsets = ctx.saved_tensors
    return (
        grouped_mm(grad, weights.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None,
        grouped_outer(x, grad, offsets) if ctx.needs_input_grad[1] else None,
        None,
    )


def _outer_backward(ctx, grad):  # [groups, A, B]
    a, b, offsets = ctx.saved_tensors
    return (
        grouped_mm(b, grad.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None,
        grouped_mm(a, grad, offsets) if ctx.needs_input_grad[1] else None,
        None,
    )


# Operators of their own, so that torch.compile takes the loop too, and inductor float32.
grouped_mm = define(
    "grouped_mm(Tensor x, Tensor weights, Tensor offsets) -> Tensor",
    product,
    lambda x, weights, offsets: x.new_empty(x.shape[0], weights.shape[2]),
    _save_product,
    _product_backward,
)
grouped_outer = define(
    "grouped_outer(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    outer,
    lambda a, b, offsets: a.new_empty(offsets.shape[0], a.shape[1], b.shape[1]),
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    _outer_backward,
)


# ---- the units of a slice ---------------------------------------------------------------------------------


def _table(index: Tensor, most: int, groups: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Make a table of the units of each group, with as many places for every group. Nothing waits for the device.

    Rows of `width` elements start at multiples of 16 bytes, as the grouped product needs it.

    Returns:
        The units [groups, places] int64, 0 in a place without a unit, and the place of each entry of the index, counted
        through all groups, [n] int64; None if no place is empty.
    """
    step = ALIGNMENT // dtype.itemsize
    width = -(-most // step) * step
    units = index % size
    if index.shape[0] == groups * width:
        return units.view(groups, width), None
    group = index // size
    first = torch.searchsorted(group, torch.arange(groups, device=index.device))
    places = group * width + torch.arange(index.shape[0], device=index.device) - first[group]
    return index.new_zeros(groups * width).index_copy(0, places, units).view(groups, width), places


def _columns(x: Tensor, units: Tensor, offsets: Tensor) -> Tensor:
    """The entries of x [T, size] at the units of each row's group: [T, places]."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    group = torch.searchsorted(offsets, rows, right=True).clamp_(max=offsets.shape[0] - 1)
    places = rows.long()[:, None] * x.shape[1] + units[group]
    return x.flatten().index_select(0, places.flatten()).view(places.shape)  # a gather keeps all of x for its backward


def columns_to_keep(x: Tensor, weight: Tensor, index: Tensor, most: int, offsets: Tensor) -> Tensor:
    """Copy the selected columns of x, which is all that the gradient of a delta of dim 1 needs of x."""
    units, _ = _table(index, most, weight.shape[0], weight.shape[2], x.dtype)
    return _columns(x, units, offsets)


def delta_gradient(grad: Tensor, kept: Tensor, delta: Tensor, index, most, offsets, dim, groups, size) -> Tensor:
    """The gradient of delta. `kept` is all of x for dim 0, and its selected columns for dim 1."""
    units, places = _table(index, most, groups, size, grad.dtype)
    if dim == 0:
        sums = below_autograd(grouped_outer, _columns(grad, units, offsets), kept, offsets).flatten(0, 1)
    else:
        sums = below_autograd(grouped_outer, grad, kept, offsets).transpose(0, 1).flatten(1)
    if places is not None:
        sums = sums.index_select(dim, places)
    return sums.to(delta.dtype)
