"""Runs the references of the ops as on a GPU, and fails where the host would wait for a number from the device."""

import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.inside import REFERENCES

# Operators whose result, or the size of it, is a number that the host must know.
WAITING = (
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
)
# PyTorch's grouped product waits on most GPUs. References that may call it are tested without it.
WAITING_ON_MOST_GPUS = ("_grouped_mm",)
# Methods that read memory of the host directly, so that no operator shows them.
READING = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class References(TorchDispatchMode):
    """Runs the PyTorch reference of every op of s2ft in place of its compiled kernel."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function.overloadpacket._qualified_op_name.split("::")
        if namespace == "s2ft":
            with self:
                return REFERENCES[name](*args, **(kwargs or {}))
        return self.other(function, name, args, kwargs or {})

    def other(self, function, name, args, kwargs):
        return function(*args, **kwargs)


class _WithoutWaits(References):
    """Fails at an operator that waits."""

    def other(self, function, name, args, kwargs):
        by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_") and any(
            entry is not None and entry.dtype in (torch.bool, torch.uint8) for entry in args[1]
        )
        assert name not in WAITING and name not in WAITING_ON_MOST_GPUS and not by_mask, f"the host waits in {function}"
        return function(*args, **kwargs)


@contextmanager
def no_waits(directly: bool = False):
    """Run ops of s2ft inside as a GPU without kernels runs them. A wait is an AssertionError.

    The tensors are on the CPU, so that results can be compared.

    Args:
        directly: True to take the short way to an op that s2ft takes where no mode of PyTorch sees the call.
    """
    modules = [module for name, module in sys.modules.items() if name.startswith("s2ft.ops.")]
    with ExitStack() as stack:
        for module in modules:
            if "host_can_read" in vars(module):
                stack.enter_context(mock.patch.object(module, "host_can_read", lambda _: False))
            if directly and "runs_directly" in vars(module):
                stack.enter_context(mock.patch.object(module, "runs_directly", lambda *_: True))
        stack.enter_context(mock.patch("s2ft.ops._grouped._prefers_one_product", lambda *_: False))
        for name in READING:
            error = AssertionError(f"the host waits in Tensor.{name}")
            stack.enter_context(mock.patch.object(torch.Tensor, name, mock.Mock(side_effect=error)))
        stack.enter_context(_WithoutWaits())
        yield


@contextmanager
def no_waits_on_gpu():
    """PyTorch raises where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
