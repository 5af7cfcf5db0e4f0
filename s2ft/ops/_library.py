"""The one torch Library of s2ft. Every op is declared once, in Python.

The schema and the PyTorch reference are Python; csrc/ only adds kernels for a device. The dispatcher calls the compiled
kernel of a device if there is one, and the reference otherwise. The library therefore gives the same numbers if the
compiled module is present, absent or loaded later.
"""

import os
import sys
import threading
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active as transforms_active,
    _is_tracing as is_tracing,
    _len_torch_dispatch_stack as dispatch_modes,
    _len_torch_function_stack as function_modes,
)
from torch.autograd.forward_ad import unpack_dual
from torch.compiler import is_dynamo_compiling  # other compilers and exporters trace with a mode or with fake tensors

LIBRARY = torch.library.Library("s2ft", "DEF")
PLAIN = (Tensor, torch.nn.Parameter, type(None))  # classes of arguments whose operations nothing intercepts


# The reference of each op by name, so that tests can run it in place of a compiled kernel.
REFERENCES: dict[str, Callable] = {}


def host_can_read(tensor: Tensor) -> bool:
    """Whether reading a value costs nothing. On a GPU the host would wait for all work that it has enqueued before.

    References read values, such as the number of rows of a group, where this is True. Elsewhere they compute without
    them, so that they never wait and can be captured in a CUDA graph.
    """
    return tensor.device.type == "cpu"


def is_being_captured(tensor: Tensor) -> bool:
    """Whether work on the tensor is recorded in a CUDA graph. The host can't wait then."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def own_output(y: Tensor) -> Tensor:
    """Return the same values as a tensor that is no view.

    Products of PyTorch may return a view. A model may change the output in place, which autograd refuses for a view
    that an op returns. A compiled graph computes its outputs anew, and can't ask.
    """
    return y if is_dynamo_compiling() or not y._is_view() else torch.ops.aten._unsafe_view(y, y.shape)


def define(
    schema: str,
    reference: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
):
    """Declare one op.

    Args:
        schema: Schema of the op, such as ``"permute_(Tensor(a!) weight, Tensor order, int dim) -> ()"``.
        reference: Definition of the op in PyTorch. It is the kernel of every device without a compiled one.
        fake: Function that returns tensors of the right shape and dtype, for torch.compile and meta tensors.
        setup_context: Function that saves what the backward needs. Default: the op has no gradient.
        backward: Gradient. It calls ops only, so that torch.compile can trace it.

    Returns:
        The op's overload.
    """
    name = schema.partition("(")[0]
    REFERENCES[name] = reference
    LIBRARY.define(schema)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"s2ft::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"s2ft::{name}", backward, setup_context=setup_context, lib=LIBRARY)
        _refuse_tangents(name)
    return getattr(torch.ops.s2ft, name).default


def _refuse_tangents(name: str) -> None:
    """Make an op raise NotImplementedError for arguments with a tangent, which its formula would lose silently."""
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta"):
        kernel = torch.library.get_kernel(f"s2ft::{name}", key)

        def run(keyset, *args, kernel=kernel):
            if any(isinstance(value, Tensor) and unpack_dual(value).tangent is not None for value in args):
                raise NotImplementedError(
                    f"s2ft::{name} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad): "
                    "use reverse mode, or differentiate the merged model (s2ft.merge)"
                )
            return kernel.call_boxed(keyset, *args)

        LIBRARY.impl(name, run, key, with_keyset=True)


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether nothing sees the call of an op besides the dispatcher and autograd.

    False while a compiler or tracer records it, under functorch's transforms, inside a mode, and for subclasses of
    Tensor such as DTensor and fake tensors. They know the registered op, so it must be called.
    """
    if is_dynamo_compiling() or transforms_active() or is_tracing() or dispatch_modes() or function_modes():
        return False
    for tensor in tensors:  # all() would take 1 µs
        if type(tensor) not in PLAIN:
            return False
    return True


def below_autograd(op: Callable, *args) -> Tensor:
    """Return op(*args), without the 10 µs of an autograd function in Python if gradients are off."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def autocast_input(op: str, x: Tensor, weight: Tensor) -> Tensor:
    """Return x in the dtype of the product: autocast's dtype if autocast is on, otherwise the weight's.

    The weight keeps its dtype. base + delta is summed in the wider of their dtypes, and rounded once to the weight's
    dtype. Casting both before the sum would lose every update that is smaller than a step of the low-precision dtype.

    Raises:
        TypeError: x and weight differ in dtype, and autocast is off.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    if x.dtype != weight.dtype:
        raise TypeError(f"{op}: x is {x.dtype} and weight is {weight.dtype}; give both one dtype or use torch.autocast")
    return x


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
