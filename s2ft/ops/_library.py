"""The one torch Library of s2ft: every op is declared once, here and in Python.

The schema and the PyTorch reference stand in Python; csrc/ adds kernels for a device and nothing
else. The dispatcher takes a compiled kernel where there is one and the reference elsewhere, so the
library gives the same numbers with the compiled module present, absent, or loaded later.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("s2ft", "DEF")


def define(
    schema: str,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
):
    """Declare one op and return its overload.

    Args:
        schema: e.g. ``"permute_(Tensor(a!) weight, Tensor order, int dim) -> ()"``.
        reference: what the op means, in PyTorch; also the kernel of every device without a compiled one.
        fake: shapes and dtypes only, for torch.compile and meta tensors.
        setup_context, backward: the gradient; backward calls ops only, so that it compiles too.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s2ft::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"s2ft::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    return getattr(torch.ops.s2ft, name).default


def autocast_input(op: str, x: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype to multiply in: autocast's where it is on, else it must be the weight's.

    The weight stays as it is. base + delta is summed in the weight's own dtype and rounded once
    inside the op: casting both first would lose every update smaller than the low dtype's step.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    if x.dtype != weight.dtype:
        raise TypeError(f"{op}: x is {x.dtype} and weight is {weight.dtype}; give both one dtype or use torch.autocast")
    return x


def check_linear(op: str, x: Tensor, weight: Tensor, delta: Tensor, dim: int, bias: Tensor | None) -> None:
    """Checks that sliced_linear and indexed_linear share; ValueError names the argument."""
    if dim not in (0, 1):
        raise ValueError(f"{op}: dim must be 0 (outputs) or 1 (inputs), got {dim}")
    if weight.dim() != 2 or delta.dim() != 2:
        raise ValueError(
            f"{op}: weight and delta must be matrices, got shapes {tuple(weight.shape)} and {tuple(delta.shape)}"
        )
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)} does not fit weight of shape {tuple(weight.shape)}")
    if delta.shape[1 - dim] != weight.shape[1 - dim]:
        raise ValueError(
            f"{op}: delta of shape {tuple(delta.shape)} does not fit dim {dim} of weight of shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_index(op: str, index: Tensor, length: int, size: int) -> None:
    """index is int64 of shape (length,) with every entry in 0..size-1; ValueError otherwise.

    The entries are looked at on the CPU only: on a GPU a look would wait for the device, and a fake tensor has none.
    """
    if index.dtype != torch.int64 or index.shape != (length,):
        raise ValueError(
            f"{op}: index must be int64 of shape ({length},), got {index.dtype} of shape {tuple(index.shape)}"
        )
    if torch.compiler.is_compiling() or index.device.type != "cpu" or length == 0 or type(index) is not Tensor:
        return
    low, high = torch.aminmax(index)
    if low < 0 or high >= size:
        raise ValueError(f"{op}: index has {int(low if low < 0 else high)}, outside 0..{size - 1}")


def check_dim(op: str, weight: Tensor, dim: int) -> None:
    if not (1 <= weight.dim() <= 3 and 0 <= dim < weight.dim()):
        raise ValueError(
            f"{op}: weight must have 1 to 3 dimensions and dim be one of them, "
            f"got shape {tuple(weight.shape)} and dim {dim}"
        )


def check_movable(op: str, weight: Tensor, dim: int, index: Tensor, values: Tensor, name: str) -> None:
    """values has weight's shape but for the units along dim, which index names one by one."""
    check_dim(op, weight, dim)
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{op}: index must be int64 with one dimension, got {index.dtype} of shape {tuple(index.shape)}"
        )
    shape = (*weight.shape[:dim], index.numel(), *weight.shape[dim + 1 :])
    if values.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(values.shape)}")


def check_distinct(op: str, index: Tensor, size: int, name: str = "index") -> None:
    """Every entry of index in 0..size-1, none twice; ValueError otherwise. On a GPU this waits for it once.

    References call it, and public functions for a GPU; the compiled CPU kernels do the same themselves.
    """
    if torch.compiler.is_compiling() or index.numel() == 0:
        return
    ordered = index.sort().values
    repeats = ordered[1:] == ordered[:-1]
    low, high, repeated = torch.stack((ordered[0], ordered[-1], repeats.sum())).tolist()  # the only wait
    if low < 0 or high >= size:
        raise ValueError(f"{op}: {name} has {low if low < 0 else high}, outside 0..{size - 1}")
    if repeated:
        raise ValueError(f"{op}: {name} names unit {int(ordered[1:][repeats][0])} twice")


def count_change(*weights: Tensor) -> None:
    """Tell autograd that an op of ours wrote to them: a backward that kept one must raise, not go wrong."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([weight for weight in weights if not weight.is_inference()])
