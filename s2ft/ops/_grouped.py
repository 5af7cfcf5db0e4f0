"""Products of groups of rows with one matrix each: what a mixture of experts does with its tokens.

Rows are sorted by group. `offsets` [groups] int32 has the end of each group, and rows after the last group belong to
none: their result is undefined. PyTorch has one kernel for all groups. It takes float32, bfloat16 and float16 and needs
rows and matrices that start at multiples of 16 bytes. A loop over the groups does the rest, and waits for the device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2ft.ops._library import define

ALIGNMENT = 16  # bytes


def takes(tensor: Tensor) -> bool:
    """Whether PyTorch's grouped product takes this operand, a matrix or a stack of them."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or tensor.data_ptr() % ALIGNMENT:
        return False
    others = [stride for stride in tensor.stride()[-2:] if stride != 1]
    return len(others) < 2 and 0 not in tensor.shape[-2:] and not any(s * tensor.itemsize % ALIGNMENT for s in others)


def product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows x [T, A] by the matrix of their group: weights [groups, A, B] → [T, B]."""
    x = x.contiguous()
    if takes(x) and takes(weights):
        return F.grouped_mm(x, weights, offs=offsets)
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
    if takes(a) and takes(b):
        return F.grouped_mm(a.t(), b, offs=offsets)
    sums = a.new_zeros(offsets.shape[0], a.shape[1], b.shape[1])
    begin = 0
    for group, end in enumerate(offsets.tolist()):
        if end > begin:
            sums[group] = a[begin:end].t() @ b[begin:end]
            begin = end
    return sums


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


def _save_outer(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


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
    _save_outer,
    _outer_backward,
)
