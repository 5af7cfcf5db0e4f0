"""Checks of the memory of a weight. It is written, so it must be writable and belong to this process alone."""

import os
import sys
import threading
from collections.abc import Callable
from functools import wraps

from torch import Tensor

# Held while weights and what is kept of their base change. The same thread may take it again.
WRITING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child has no other thread that would finish a change and give the lock back
    os.register_at_fork(before=WRITING.acquire, after_in_parent=WRITING.release, after_in_child=WRITING.release)

MAPS = "/proc/self/maps"  # Linux only


def check_writable(op: str, weight: Tensor) -> None:
    """Check that a write to `weight` would not end the process. The compiled kernels have a check of their own.

    Args:
        op: Name of the operation, for the message.
        weight: Any tensor. Only CPU memory is checked.

    Raises:
        ValueError: The tensor is in a read-only mapping.
    """
    found = _mapping_of(weight)
    if found is not None and "w" not in found[0]:
        raise ValueError(
            f"{op}: weight is in read-only memory, such as a memmap of mode 'r', and this op writes to it: "
            "pass a copy, weight.clone()"
        )


def writing(op: str, reference: Callable) -> Callable:
    """Wrap the reference of an op that writes to its first argument, so that it checks that this is possible."""

    @wraps(reference)
    def run(weight: Tensor, *args) -> None:
        check_writable(op, weight)
        reference(weight, *args)

    return run


def check_private(what: str, weight: Tensor) -> None:
    """Check that `weight` is writable and that no other process shares its memory. This takes about 50 µs.

    Args:
        what: Name of the weight, for the message.
        weight: Any tensor. Only CPU memory is checked.

    Raises:
        ValueError: The tensor is in shared memory, a shared mapping of a file, or a read-only mapping.
    """
    found = _mapping_of(weight)
    if found is None:
        return
    flags, file = found
    where = f" ({file})" if file else ""
    if "w" not in flags:
        raise ValueError(
            f"{what} is in read-only memory{where}, and s2ft writes to the weights that it trains: load "
            "the model without a memory map, or clone the weight"
        )
    if "s" in flags:
        raise ValueError(
            f"{what} is in memory that is shared with other processes{where}. A weight holds base + delta, and they "
            "would compute with it too: give every process its own weights (clone them), and share only the trained s2"
        )


def _mapping_of(weight: Tensor) -> tuple[str, str] | None:
    """Return the flags, such as "rw-p", and the file of a CPU tensor's mapping, or None if they are unknown."""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return None
    if not sys.platform.startswith("linux"):
        return ("rw-s", "") if weight.is_shared() else None
    address = weight.data_ptr()
    with open(MAPS, encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, flags, *_, file = line.rstrip("\n").split(" ", 5)
            first, last = span.split("-")
            if int(first, 16) <= address < int(last, 16):
                return flags, file.strip()
    return None
