"""The memory of this process, or of a GPU: its peak, and a limit."""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def size_of_process(key: str) -> int:
    """Return a size of this process in bytes.

    Args:
        key: "VmRSS", its memory now, "VmHWM", the peak of that, or "VmData", which a limit counts. A system without
            /proc knows the peak only, and returns it for each.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return _kibibytes(status, key)


def _kibibytes(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, so that it does not hide what comes next."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


@contextlib.contextmanager
def limited(device: str, limit_bytes: int | None) -> Iterator[None]:
    """Let an allocation fail inside the context if this process takes more than so many bytes above what it has now.

    On Linux a process on the CPU gets a limit of nine tenths of the free memory at most, so that the system ends
    nothing else.

    Args:
        device: "cpu" or "cuda".
        limit_bytes: The memory that may be taken; None sets no limit of its own.
    """
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if limit_bytes is None else min(1.0, limit_bytes / total))
        yield
        return
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    free = int(0.9 * _kibibytes(Path("/proc/meminfo"), "MemAvailable"))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, ((size_of_process("VmData") + min(free, limit_bytes or free)), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


class PeakMemory:
    """The peak memory of this process, or of a GPU, above what it was when the object was made.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated() if device == "cuda" else size_of_process("VmRSS")

    def forget_peak(self) -> None:
        """Begin to watch for a peak now. Only Linux can forget the peak of a process."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            with contextlib.suppress(PermissionError):  # then the peak has what making the model took
                Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak in bytes since :meth:`forget_peak`."""
        return (torch.cuda.max_memory_allocated() if self.device == "cuda" else size_of_process("VmHWM")) - self.before
