"""The tensors in what a model returns, and by how much two of them differ."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

SAMPLE = 4096  # entries of a row that its spread is read from
SHORT = 64  # shorter rows are joined


def tensors_in(output: Any, name: str = "") -> Iterator[Tensor]:
    """Iterate over the floating-point and complex tensors of a model's output.

    Attention weights and caches are left out, because heads that are reordered change them.
    """
    if "attentions" in name or "cache" in name or "past" in name:
        return
    if isinstance(output, Tensor):
        if output.is_floating_point() or output.is_complex():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from tensors_in(value, str(key))
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value, name)


def largest_change(now: Iterable[Tensor], then: Iterable[Tensor]) -> float:
    """The largest of :func:`changes` over pairs of tensors; infinity if there are more on one side."""
    now, then = list(now), list(then)
    pairs = [float(changes(*pair).max()) for pair in zip(now, then)]
    return max([*pairs, 0.0]) if len(now) == len(then) else torch.inf


def changes(now: Tensor, then: Tensor) -> Tensor:
    """By how much each entry of a tensor has changed, as a share of its size and of its row's usual size.

    A row is as large as its smaller entries: values that stand for "never", such as the lowest number of a dtype, hide
    nothing. NaN equals NaN, and infinity equals infinity.

    Args:
        now: The tensor after a change.
        then: The tensor before it.

    Returns:
        Shares [rows, entries] or [1], float64; infinity where only one entry is a number, or for another shape.
    """
    if now.shape != then.shape or now.dtype != then.dtype:
        return torch.tensor([torch.inf])
    if not now.numel():
        return torch.zeros(1)
    now, then = _rows(now), _rows(then)
    same = (now == then) | (now.isnan() & then.isnan())
    if bool(same.all()):
        return torch.zeros(1)
    found = (now - then).abs() / (then.abs() + _usual_size(then))
    return found.nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor in float64 as rows of at least SHORT entries, if it has as many."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    tensor = torch.view_as_real(tensor).flatten(-2) if tensor.is_complex() else tensor
    dims = tensor.dim()
    while dims > 0 and tensor.shape[dims - 1 :].numel() < SHORT:
        dims -= 1
    length = tensor.shape[max(dims - 1, 0) :].numel()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).reshape(-1, length).double()


def _usual_size(rows: Tensor) -> Tensor:
    """The usual size of each row's entries, [rows, 1]: for normal numbers about their standard deviation."""
    sample = rows[:, :: rows.shape[1] // SAMPLE | 1]
    counts = sample.isfinite() & (sample != 0)
    for sign in (1, -1):  # a value that stands for "never" is the least or the largest, and is there often
        signed = (sign * sample).masked_fill(~counts, torch.inf)
        least = signed == signed.amin(1, keepdim=True)
        counts &= ~(least & (least.sum(1, keepdim=True) > 1))
    sizes = sample.abs().masked_fill(~counts, torch.nan)
    usual = 3 * sizes.nanquantile(0.25, dim=1, keepdim=True)
    return usual.nan_to_num(0.0).maximum(1e-6 * usual.nanmedian().nan_to_num(0.0))
