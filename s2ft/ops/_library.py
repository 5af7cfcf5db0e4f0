"""The one torch Library of s2ft. Every op is declared once, in Python.

The schema and the PyTorch reference are Python; csrc/ only adds kernels for a device. The dispatcher calls the compiled
kernel of a device if there is one, and the reference otherwise. The library therefore gives the same numbers if the
compiled module is present, absent or loaded later.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active as transforms_active,
    _is_tracing as is_tracing,
    _len_torch_dispatch_stack as dispatch_modes,
    _len_torch_function_stack as function_modes,
)
from torch.autograd import forward_ad
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
            if any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in args):
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
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Compute in the tensors' own dtype under autocast too, on every thread: a CPU's workers don't have its setting."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def autocast_input(op: str, x: Tensor, weight: Tensor) -> Tensor:
    """Return x in the dtype of the product: autocast's dtype if autocast is on, otherwise the weight's.

    The weight keeps its dtype. base + delta is summed in the wider of their dtypes, and rounded once to the weight's
    dtype. Casting both before the sum would lose every update that is smaller than a step of the low-precision dtype.

    Raises:
        TypeError: x and weight differ in dtype, and autocast is off.
    """
    device = x.device.type
    if device != "meta" and x.dtype is not torch.float64 and torch.is_autocast_enabled(device):  # as torch's own
        return x.to(torch.get_autocast_dtype(device))
    if x.dtype != weight.dtype:
        raise TypeError(f"{op}: x is {x.dtype} and weight is {weight.dtype}; give both one dtype or use torch.autocast")
    return x
