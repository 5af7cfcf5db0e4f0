"""The device of a command."""

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)


def gpu_or_cpu(keep_memory: bool = False) -> torch.device:
    """Return the GPU if there is one, else the CPU, and log the latter.

    Args:
        keep_memory: Whether a process on the CPU keeps freed memory, see :func:`keep_freed_memory`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say_device(device)
    if device.type == "cpu" and keep_memory:
        keep_freed_memory()
    return device


def say_device(device: torch.device) -> None:
    """Log that the command runs on the CPU because PyTorch finds no GPU."""
    if device.type == "cpu":
        logger.info("running on the CPU: PyTorch %s finds no GPU", torch.__version__)


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor. Returns False if the C library is not glibc.

    glibc gives a large tensor back to the system, which zeroes its pages again for the next one: up to a third of a
    training step on a CPU. The memory stays with the process until it ends.
    """
    never_trim, never_map = (-1, 2**31 - 1), (-4, 0)  # M_TRIM_THRESHOLD, M_MMAP_MAX
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(*setting) for setting in (never_trim, never_map))
