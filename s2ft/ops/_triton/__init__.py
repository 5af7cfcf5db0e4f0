"""Triton kernels of act_mul and multi_adapter_linear, for GPUs on which the CUDA kernels of s2ft can't run.

They are kernels of the same registered operators, for PyTorch's key CUDA, which is also the key of AMD's GPUs. A call,
its gradient and its shape for torch.compile are therefore the same as with any other implementation, and a compiler
sees one opaque operator. Which implementation is used is decided once, when PyTorch initialises CUDA: the CUDA kernels
if they can run on every visible GPU, else Triton if it can, else the references in PyTorch.

Triton compiles a kernel at its first call, and needs a C compiler and Python's headers for that. If a first call fails,
the reference computes this call and all later ones, and a warning says so.
"""

import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2ft.ops import _build
from s2ft.ops._library import LIBRARY, REFERENCES
from s2ft.ops.act_mul import check as check_activation
from s2ft.ops.multi_adapter_linear import check_shapes
from s2ft.packages import is_installed

SWITCH = "S2FT_TRITON"
CAPABILITY = (8, 0)  # the lowest that Triton supports
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = ("act_mul", "act_mul_backward", "multi_adapter_linear")


def why_unusable(switch: str | None, installed: bool, amd: bool, devices: Sequence[tuple[str, tuple[int, int]]]) -> str:
    """Return the reason why Triton's kernels are not used, or an empty string if they are.

    Args:
        switch: Value of S2FT_TRITON, None if it is not set.
        installed: True if Triton is installed.
        amd: True for a PyTorch that was built for ROCm.
        devices: Name and compute capability of every visible GPU. A capability of AMD's GPUs is not compared: ROCm's
            PyTorch comes with a Triton for the GPUs that it supports.
    """
    if switch not in (None, "0", "1"):
        return f"{SWITCH} must be 0 or 1, got {switch!r}"
    if switch == "0":
        return f"{SWITCH}=0 switches it off"
    if not installed:
        return "it is not installed; pip install triton, or triton-windows on Windows"
    left_out = [
        f"{number} ({name}, compute capability {'.'.join(map(str, capability))})"
        for number, (name, capability) in enumerate(devices)
        if not amd and capability < CAPABILITY
    ]
    if left_out:
        return f"it needs compute capability 8.0, which device {', device '.join(left_out)} does not have"
    return ""


def register() -> None:
    """Register the kernels for CUDA if they can run and the CUDA kernels can't, and tell build_info().

    PyTorch calls this while it initialises CUDA, and an exception would make that fail. This function raises nothing.
    """
    if _build.has_cuda_kernels():
        return
    try:
        devices = [
            (torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))
            for number in range(torch.cuda.device_count())
        ]
        amd = torch.version.hip is not None
        reason = why_unusable(os.environ.get(SWITCH), is_installed("triton"), amd, devices)
        if not reason:
            for name, function in kernels().items():
                LIBRARY.impl(name, function, "CUDA")
    except Exception as error:
        reason = f"it could not be loaded: {error}"
    _build.report_triton(() if reason else OPS, reason)


def kernels() -> dict[str, Callable]:
    """Import Triton and return what the dispatcher calls, by op."""
    from s2ft.ops._triton import act_mul as activations, multi_adapter_linear as banks

    return {
        "act_mul": _Kernel("act_mul", check_act_mul, activations.act_mul),
        "act_mul_backward": _Kernel("act_mul_backward", check_act_mul_backward, activations.act_mul_backward),
        "multi_adapter_linear": _Kernel(
            "multi_adapter_linear", check_shapes, banks.multi_adapter_linear, banks.rows_of_a_program
        ),
    }


def check_act_mul(gate: Tensor, up: Tensor, activation: str) -> None:
    check_activation("act_mul", gate, activation, up=up)


def check_act_mul_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    check_activation("act_mul_backward", gate, activation, up=up, grad=grad)


class _Kernel:
    """Checks the arguments and calls a Triton kernel, or the reference once a first call has failed.

    Args:
        op: Name of the op.
        check: Function of the op's arguments that raises for wrong ones.
        launch: Function that runs the kernel.
        form: Function of the op's arguments that says which of several kernels `launch` would run.
    """

    def __init__(self, op: str, check: Callable, launch: Callable, form: Callable = lambda *arguments: 0) -> None:
        self.op, self.check, self.launch, self.form, self.reference = op, check, launch, form, REFERENCES[op]
        self.compiled: set[tuple] = set()  # dtype, options and form of calls that have worked

    def __call__(self, *arguments):
        self.check(*arguments)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        device = tensors[0].device
        for tensor in tensors:
            if tensor.device != device:
                raise ValueError(f"{self.op}: all tensors must be on one device, got {device} and {tensor.device}")
        if not _build.runs_in_triton(self.op) or tensors[0].dtype not in DTYPES:
            return self.reference(*arguments)
        variant = (tensors[0].dtype, *arguments[len(tensors) :], self.form(*arguments))
        with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
            if variant in self.compiled:
                return self.launch(*arguments)
            try:
                result = self.launch(*arguments)
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # not about Triton
                raise
            except Exception as error:
                self._give_up(error)
                return self.reference(*arguments)
        self.compiled.add(variant)
        return result

    def _give_up(self, error: Exception) -> None:
        remaining = [op for op in OPS if op != self.op and _build.runs_in_triton(op)]
        reason = f"{self.op} failed: {type(error).__name__}: {error}"
        _build.report_triton(remaining, reason)
        warnings.warn(
            f"s2ft: the Triton kernel of {reason}. The PyTorch implementation is used for it from now on. Triton needs "
            f"a C compiler and Python's headers. Set {SWITCH}=0 to leave Triton out.",
            RuntimeWarning,
            stacklevel=2,
        )


def register_with_cuda() -> None:
    """Let PyTorch call :func:`register` when it initialises CUDA, or now if it has done so."""
    torch.cuda._lazy_call(register)
