"""Whether the CUDA kernels that were built can run on the GPUs that are there.

Plain functions of numbers, so that every answer can be tested without a GPU.
"""

import re
from collections.abc import Sequence

ARCH = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


def serves(arch: str, capability: tuple[int, int], jit: bool) -> bool:
    """Say whether code that was built for `arch` runs on a GPU of this compute capability.

    Machine code runs within one major version, on the same or a higher minor version. PTX is compiled by the driver
    for any capability that is not lower. Code for an architecture-specific target ("9.0a") runs on that one only, code
    for a family-specific one ("10.0f") within the major version.

    Args:
        arch: as in TORCH_CUDA_ARCH_LIST, such as "8.0" or "12.0+PTX".
        capability: major and minor.
        jit: whether the driver can compile the PTX.
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
    """Say why the CUDA kernels can't be used; an empty string where they can.

    Args:
        driver: the CUDA version that the driver serves, 1000 * major + 10 * minor; 0 without a driver.
        built: the CUDA version of the compiler and the runtime that the kernels were built with, in the same form.
        archs: the architectures that they were built for.
        devices: name and compute capability of every visible GPU.
    """
    if not driver:
        return "there is no CUDA driver"
    if driver // 1000 < built // 1000:
        return (
            f"the driver serves CUDA up to {version(driver)} and the kernels were built with CUDA {version(built)}"
            f": install a newer driver, or build s2ft with a toolkit of CUDA {driver // 1000}"
        )
    jit = driver >= built  # within a major version an older driver runs machine code, but can't compile newer PTX
    left_out = [
        f"{number} ({name}, compute capability {'.'.join(map(str, capability))})"
        for number, (name, capability) in enumerate(devices)
        if not any(serves(arch, capability, jit) for arch in archs)
    ]
    if not left_out:
        return ""
    return (
        f"the kernels were built for {', '.join(archs)}, which does not serve device {', device '.join(left_out)}: "
        "set TORCH_CUDA_ARCH_LIST when building s2ft, or leave the device out with CUDA_VISIBLE_DEVICES"
    )


def version(number: int) -> str:
    """12080 → "12.8"."""
    return f"{number // 1000}.{number % 1000 // 10}"
