"""Run a measurement in a process of its own, so that its memory is its own and a lack of memory ends nothing else."""

import contextlib
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from s2ft.train.out_of_memory import OutOfMemory, first_line, is_out_of_memory


def in_own_process(
    function: Callable[..., Any], *arguments: Any, limit_bytes: int | None = None, imports: Sequence[str] = ()
) -> Any:
    """Call a function in a new process and return what it returns.

    The processes are forked from one that has imported the function's module and nothing else, so that each starts in
    milliseconds. It is started by the first call.

    Args:
        function: A function of a module, which the new process can import.
        *arguments: Its arguments, which can be pickled.
        limit_bytes: Memory that the function may take. An allocation above it fails in the new process; without a limit
            the system may end other programs too. Only Linux has such a limit.
        imports: More modules that the common process imports, if it is started by this call.

    Returns:
        The result, which can be pickled.

    Raises:
        OutOfMemory: The function ran out of memory, or the system ended the process for it.
        RuntimeError: The function raised another error, or its process ended by itself. The message has the cause.

    Example:
        >>> import math
        >>> from s2ft.reproduce.processes import in_own_process
        >>> in_own_process(math.sqrt, 4.0)
        2.0
    """
    context = multiprocessing.get_context("forkserver" if hasattr(signal, "SIGKILL") else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__, function.__module__, *imports])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(theirs, torch.get_num_threads(), limit_bytes, function, arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        kind, value = ours.recv()
    except EOFError:
        kind, value = "ended", ""
    except BaseException:  # an interrupt: the process would go on
        process.kill()
        raise
    finally:
        ours.close()
        process.join()
    if kind == "ended":
        if hasattr(signal, "SIGKILL") and process.exitcode == -signal.SIGKILL:
            raise OutOfMemory("the system ended the process, as it does if memory is too small", [])
        raise RuntimeError(f"the process of {function.__qualname__} ended with code {process.exitcode}")
    if kind == "memory":
        raise OutOfMemory(value, [])
    if kind == "error":
        raise RuntimeError(f"{function.__qualname__} failed in its process:\n{value}")
    return value


def _run(connection: Any, threads: int, limit_bytes: int | None, function: Callable[..., Any], arguments: tuple):
    """Call the function and send what it returns, or why it failed. This runs in the new process."""
    torch.set_num_threads(threads)
    try:
        if limit_bytes is not None:
            _limit(limit_bytes)
        found = ("value", function(*arguments))
    except Exception as error:
        found = ("memory", first_line(error)) if is_out_of_memory(error) else ("error", traceback.format_exc())
    connection.send(found)
    connection.close()


def _limit(limit_bytes: int) -> None:
    if sys.platform.startswith("linux"):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (size_of_process("VmData") + limit_bytes, hard))


def size_of_process(key: str) -> int:
    """Return a size of this process in bytes.

    Args:
        key: "VmRSS", its memory now, "VmHWM", the peak of that, or "VmData", which a limit counts. A system without
            /proc knows the peak only, and returns it for each.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _kibibytes(status, key)


def free_bytes() -> int | None:
    """Return the memory of this machine that is free; None if the system does not say it."""
    meminfo = Path("/proc/meminfo")
    return _kibibytes(meminfo, "MemAvailable") if meminfo.exists() else None


def _kibibytes(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


class PeakMemory:
    """The peak memory of this process, or of a GPU, above what it was when the object was made.

    Args:
        device: "cpu" or "cuda".
        limit_bytes: Memory of the GPU that this process may take; an allocation above it fails.
    """

    def __init__(self, device: str, limit_bytes: int | None = None) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.init()
            if limit_bytes is not None:
                total = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total))
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
