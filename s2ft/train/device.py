"""The device of a command, and the error for too little memory on it.

PyTorch is imported in functions, so that the command stays quick.
"""

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from s2ft.files.plain_text import first_line, reason_not_written

logger = logging.getLogger(__name__)


def gpu_or_cpu(keep_memory: bool = False):
    """Return the GPU if there is one, else the CPU, and log the latter.

    Args:
        keep_memory: Whether a process on the CPU keeps freed memory, see :func:`keep_freed_memory`.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin_on(device, keep_memory)
    return device


def begin_on(device, keep_memory: bool = False, is_first: bool = True) -> None:
    """Log that the command runs on the CPU, if it does, and let the process keep freed memory there.

    Args:
        device: The device.
        keep_memory: Whether a process on the CPU keeps freed memory, see :func:`keep_freed_memory`.
        is_first: Whether this process is the one that logs.
    """
    import torch

    if device.type == "cpu" and is_first:
        logger.info("running on the CPU: PyTorch %s finds no GPU", torch.__version__)
    if device.type == "cpu" and keep_memory:
        keep_freed_memory()


def peak_memory() -> int:
    """The largest memory of this process so far, and of its GPU, in bytes."""
    import resource
    import sys

    import torch

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


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


# ---- too little memory ----------------------------------------------------------------------------------

# in messages of PyTorch, whose CPU allocator raises a plain RuntimeError
MESSAGES = ("DefaultCPUAllocator", "not enough memory", "CUDA out of memory", "out of memory")


class OutOfMemory(MemoryError):
    """Memory was too small. The message says what failed and what to change, and its next line what is kept."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was too small: Python's, or one of PyTorch's allocators."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in MESSAGES))
    )


def words_of_allocator(error: BaseException) -> str:
    """Return the first sentence of an allocator's message, which goes on with statistics and settings.

    The CPU allocator begins with the place in PyTorch's source, which is left out.
    """
    text = first_line(error)
    text = text[text.index("DefaultCPUAllocator") :] if "DefaultCPUAllocator" in text else text
    return text.split(" GPU ")[0].strip().rstrip(".") or type(error).__name__


@contextmanager
def explain_out_of_memory(switch: str, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turn an out-of-memory error inside the context into one that says what is free and which switch helps most.

    The error for a file that can't be written, for example on a full disk, says what is kept too.

    Args:
        switch: The options to give.
        kept: Returns a sentence about what the run has kept.

    Raises:
        OutOfMemory: Memory was too small.
        OSError: A file can't be written.
    """
    try:
        yield
    except Exception as error:
        reason = reason_not_written(error)
        if reason and (left := kept()):
            raise OSError(f"{reason}; {left}") from error
        if not is_out_of_memory(error):
            raise
        import torch

        from s2ft.estimation.devices import size
        from s2ft.estimation.step import free_memory

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        free = free_memory(device)
        room = "" if free is None else f"; {size(free)} are free on {device}"
        lines = (f"out of memory: {words_of_allocator(error)}{room}; {switch} needs less", kept())
        raise OutOfMemory("\n".join(filter(None, lines))) from error


def smaller_answers(batch: int, dtype: str) -> str:
    """Return the options with which generated answers take less memory.

    Args:
        batch: Answers that are generated at once.
        dtype: Dtype of the weights.
    """
    if batch > 1:
        return f"--batch-size {max(1, batch // 4)}"
    return "--dtype bfloat16" if dtype == "torch.float32" else "a smaller --max-new-tokens"
