"""Loads the compiled kernels and reports the build. Importing :mod:`s2ft` works without compiled kernels."""

import importlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from s2ft import __version__
from s2ft.files.reading import json_entry
from s2ft.foreign import newer_than_tested

# ---- which GPUs the kernels of a build run on: from plain numbers, so that every case can be tested without a GPU ----

ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def runs_on(arch: str, capability: tuple[int, int], jit: bool) -> bool:
    """Return True if code that was built for `arch` runs on a GPU of this compute capability.

    Machine code runs within one major version, on the same or a higher minor version. The driver compiles PTX for every
    capability that is not lower. Code for an architecture-specific target ("9.0a") runs on that capability only. Code
    for a family-specific target ("10.0f") runs within the major version.

    Args:
        arch: Architecture as in TORCH_CUDA_ARCH_LIST, such as "8.0" or "12.0+PTX".
        capability: Major and minor version of the GPU.
        jit: True if the driver can compile the PTX.
    """
    match = ARCH.fullmatch(arch)
    if match is None:
        return False
    built = int(match[1]), int(match[2])
    if match[3] == "a":
        return capability == built
    if capability[0] == built[0]:
        return capability >= built
    return jit and bool(match[4]) and not match[3] and capability > built


def why_unusable(driver: int, built: int, archs: Sequence[str], devices: Sequence[tuple[str, tuple[int, int]]]) -> str:
    """Return the reason why the CUDA kernels can't be used, or an empty string if they can.

    Args:
        driver: CUDA version of the driver, 1000 * major + 10 * minor; 0 without a driver.
        built: CUDA version of the compiler and runtime of the build, in the same form.
        archs: Architectures of the build.
        devices: Name and compute capability of every visible GPU.
    """
    if not driver:
        return "there is no CUDA driver"
    if driver // 1000 < built // 1000:
        return (
            f"the driver supports CUDA up to {version(driver)} and the kernels were built with CUDA {version(built)}"
            f": install a newer driver, or build s2ft with a toolkit of CUDA {driver // 1000}"
        )
    jit = driver >= built  # within a major version an older driver runs machine code, but can't compile newer PTX
    left_out = [
        f"{number} ({name}, compute capability {'.'.join(map(str, capability))})"
        for number, (name, capability) in enumerate(devices)
        if not any(runs_on(arch, capability, jit) for arch in archs)
    ]
    if not left_out:
        return ""
    return (
        f"the kernels were built for {', '.join(archs)}, which does not support device {', device '.join(left_out)}: "
        "set TORCH_CUDA_ARCH_LIST when building s2ft, or leave the device out with CUDA_VISIBLE_DEVICES"
    )


def version(number: int) -> str:
    """Format a CUDA version: 12080 → "12.8"."""
    return f"{number // 1000}.{number % 1000 // 10}"


# ---- loading the kernels --------------------------------------------------------------------------------------------


RECORD = Path(__file__).parents[1] / "_build.json"  # written by setup.py: the result of the build and the reason
DEVICES = ("CPU", "CUDA")

_module: Any = None  # s2ft._C, once load() has imported it
_reason: str | None = None  # None until load() has run
_cuda_reason = ""  # which implementation CUDA tensors use, and why
_cuda_registered = False
_silent = False  # no warning about missing CUDA kernels is due: the user chose this, or has been warned


def load() -> ModuleType | None:
    """Load the compiled kernels once. Returns None without them, and warns if the build should have made them."""
    global _module, _reason, _silent
    if _reason is not None:
        return _module
    record = json_entry(RECORD) or {}
    files = [path.name for path in sorted(RECORD.parent.glob("_C.*")) if path.suffix in (".so", ".pyd")]
    wanted = record.get("mode") != "none"
    if record and not record.get("compiled"):
        _reason = str(record.get("reason", "the compiled kernels were not built"))
    elif not files:
        wanted = bool(record)  # a source tree without a build is not an error
        _reason = (
            "the compiled kernels were built, but the module s2ft._C is missing"
            if record
            else "this source tree was not built; run: pip install --no-build-isolation -e ."
        )
    else:
        try:
            _module = importlib.import_module("s2ft._C")
            _reason = str(record.get("reason") or "the compiled kernels are loaded")
        except Exception as error:  # a wrong ABI raises ImportError, OSError or RuntimeError
            _reason = f"the compiled kernels failed to load: {error}"
    if _module is None and wanted:
        warnings.warn(
            f"s2ft: {_reason}. The slower PyTorch implementations are used. Set S2FT_BUILD=cpu "
            "when installing to see why a build fails, or S2FT_BUILD=none to build without kernels.",
            RuntimeWarning,
            stacklevel=3,
        )
    _silent = record.get("mode") == "none" or _module is None and wanted
    _prepare_cuda(record)
    return _module


def _prepare_cuda(record: dict[str, Any]) -> None:
    """Ask PyTorch to register the CUDA kernels when it initialises CUDA. A process without CUDA then pays nothing."""
    global _cuda_reason
    if _module is None:
        _cuda_reason = str(_reason)
    elif not _module.build_info()["with_cuda"]:
        _cuda_reason = str(record.get("cuda_reason") or "the CUDA kernels were not built")
    else:
        _cuda_reason = "the CUDA kernels are built, and registered once PyTorch initialises CUDA"
        torch.cuda._lazy_call(_register_cuda)


def _register_cuda() -> None:
    """Register the CUDA kernels if they can run on every visible GPU. Otherwise the PyTorch implementations stay.

    PyTorch calls this while it initialises CUDA, and an exception would make that fail. This function raises nothing.
    """
    global _cuda_reason, _cuda_registered
    try:
        if torch.version.cuda is None:
            _cuda_reason = "this PyTorch was not built for CUDA"
            return
        devices = [
            (torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number))
            for number in range(torch.cuda.device_count())
        ]
        driver, built = _module.cuda_versions()
        _cuda_reason = why_unusable(driver, built, _archs(_module.build_info()), devices)
        if not _cuda_reason:
            _module.register_cuda()
            _cuda_registered, _cuda_reason = True, "the CUDA kernels are registered"
    except Exception as error:
        _cuda_reason = f"the CUDA kernels could not be registered: {error}"


def warn_without_cuda_kernels() -> None:
    """Warn, once per process, what CUDA tensors use without the CUDA kernels. Call it for a model on CUDA."""
    global _silent
    if _silent or _cuda_registered:
        return
    _silent = True
    warnings.warn(
        f"s2ft: the model is on CUDA and uses the PyTorch implementations there: {_cuda_reason}. Results are the same "
        "within rounding; batches of many adapters and the FFN's activation are slower.",
        RuntimeWarning,
        stacklevel=4,
    )  # the line where the user calls attach


def _archs(built: dict[str, Any]) -> list[str]:
    return [arch for arch in built.get("cuda_archs", "").split(";") if arch]


def build_info() -> dict[str, Any]:
    """Report which kernels this process uses, and why.

    CUDA kernels are registered when PyTorch initialises CUDA, if the driver and every visible GPU can run them. This
    function does not initialise CUDA, because a process that has done so can't fork workers that use it. Before CUDA is
    initialised, ``ops`` therefore lists no CUDA kernel and ``cuda_reason`` says that they are not registered yet. Call
    ``torch.cuda.init()`` first to see what CUDA tensors will use.

    Returns:
        A dict that can be written as JSON:

        - ``compiled``: True if the compiled kernels are loaded.
        - ``reason``: Why they are, or are not, as a sentence.
        - ``version``, ``torch``, ``compiler``: Versions of s2ft, PyTorch and the compiler.
        - ``cuda``: True if the build has CUDA kernels.
        - ``archs``: GPU architectures of the CUDA kernels.
        - ``cuda_version``: CUDA version of the build, or None.
        - ``cuda_reason``: Which implementation CUDA tensors use and why, as a sentence.
        - ``cuda_ops``: For every op, what CUDA tensors use: "CUDA" or "PyTorch". Empty before CUDA starts.
        - ``ops``: For every op, the devices with a registered kernel. Other devices use the PyTorch implementation.
        - ``untested``: The installed packages that are newer than any release that s2ft was tested with, as a sentence.

    Example:
        >>> info = s2ft.build_info()
        >>> sorted(info)
        ['archs', 'compiled', 'compiler', 'cuda', 'cuda_ops', 'cuda_reason', 'cuda_version', 'ops', 'reason', 'torch',
        'untested', 'version']
        >>> "sliced_linear" in info["ops"]
        True
    """
    module = load()
    built: dict[str, Any] = module.build_info() if module is not None else {}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("s2ft::"))
    kernels = {name.partition("::")[2]: [device for device in DEVICES if has(name, device)] for name in names}
    on_cuda = {op: "CUDA" if _cuda_registered and "CUDA" in devices else "PyTorch" for op, devices in kernels.items()}
    return {
        "compiled": module is not None,
        "reason": _reason,
        "version": __version__,
        "torch": torch.__version__,
        "compiler": built.get("compiler"),
        "cuda": built.get("with_cuda", False),
        "archs": _archs(built),
        "cuda_version": version(module.cuda_versions()[1]) if module is not None and built.get("with_cuda") else None,
        "cuda_reason": _cuda_reason,
        "cuda_ops": on_cuda if torch.cuda.is_initialized() else {},  # it is not decided before
        "ops": kernels,
        "untested": newer_than_tested(),
    }
