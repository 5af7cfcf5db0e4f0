"""How much memory the process holds: that which PyTorch has reserved on the device, or the process's own on a CPU."""

import resource
import sys

import numpy as np
import psutil
import torch


class Memory:
    """Reads the memory of the process, in bytes above what it held at the start.

    Args:
        device: Device of the training.

    Attributes:
        kind: What is read: "reserved on the device" or "resident set of the process".
        log: One reading for each training step.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda, self.log = device.type == "cuda", []
        self.kind = "reserved on the device" if self.is_cuda else "resident set of the process"
        self._largest, self._before = 0, 0
        if self.is_cuda:
            torch.zeros(1, device=device)
            torch.cuda.reset_peak_memory_stats()
        self._before = self._now()

    def _now(self) -> int:
        return torch.cuda.memory_reserved() if self.is_cuda else psutil.Process().memory_info().rss

    def note(self) -> None:
        """Read the memory after a training step."""
        self.log.append(max(0, self._now() - self._before))

    @property
    def peak(self) -> int:
        """The most that was held at one time, also in earlier parts of an interrupted run."""
        if self.is_cuda:
            held = torch.cuda.max_memory_reserved()
        else:  # macOS counts in bytes, Linux in KiB
            held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return max(self._largest, held - self._before)

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"log": self.log, "peak": self.peak}

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.log, self._largest = list(state["log"]), state["peak"]

    def summary(self) -> dict[str, int]:
        """The readings under the names of PEFT's results."""
        return {
            "accelerator_memory_reserved_avg": int(np.mean(self.log)),
            "accelerator_memory_max": int(self.peak),
            "accelerator_memory_reserved_99th": int(np.percentile(self.log, 99)),
        }
