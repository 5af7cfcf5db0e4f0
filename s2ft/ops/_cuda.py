"""Decides if the CUDA kernels of this build can run on the GPUs of this machine.

The functions take plain numbers, so that every case can be tested without a GPU.
"""

import re
from collections.abc import Sequence

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
