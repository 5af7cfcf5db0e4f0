"""Where a weight lies: operations write to it, so it must be memory that this process has for itself."""

import sys

from torch import Tensor

MAPS = "/proc/self/maps"  # of Linux


def check_writable(op: str, weight: Tensor) -> None:
    """Check that a store to `weight` would not end the process. The compiled kernels do so themselves.

    Args:
        op: the operation's name, for the message.
        weight: any tensor; only memory of the CPU is looked at.

    Raises:
        ValueError: it lies in a read-only mapping.
    """
    found = _mapping_of(weight)
    if found is not None and "w" not in found[0]:
        raise ValueError(
            f"{op}: weight lies in read-only memory (a memmap of mode 'r', say), and this op writes to it: "
            "give a copy, weight.clone()"
        )


def check_private(what: str, weight: Tensor) -> None:
    """Check that `weight` can be written to and that no other process sees what is written.

    Args:
        what: the weight's name, for the message.
        weight: any tensor; only memory of the CPU is looked at. Costs about 50 µs.

    Raises:
        ValueError: it lies in shared memory, a shared mapping of a file, or a read-only mapping.
    """
    found = _mapping_of(weight)
    if found is None:
        return
    flags, file = found
    where = f" ({file})" if file else ""
    if "w" not in flags:
        raise ValueError(
            f"{what} lies in read-only memory{where}, and s2ft writes to the weights that it trains: load "
            "the model without a memory map, or clone the weight"
        )
    if "s" in flags:
        raise ValueError(
            f"{what} lies in memory that is shared with other processes{where}. While an operation runs, a "
            "weight holds base + delta, and another process would take that for the base: give every "
            "process weights of its own (clone them), and share the trained s2 alone"
        )


def _mapping_of(weight: Tensor) -> tuple[str, str] | None:
    """The flags, such as "rw-p", and the file of the mapping that a CPU tensor lies in; None where that is unknown."""
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
