"""The lock under which weights are changed, and reading them at rest.

sliced_linear and its like write base + delta into a weight for the length of one product. The compiled kernels do
that under a lock of the process; where there are none, the PyTorch references do it under a lock of Python.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from s2ft.ops._build import load

_module = load()
# Its owner may take it again. Taken by `with LOCK:`, whose first step is one C call, so that an interrupt arrives
# before the lock is taken or when the block that gives it back has begun.
LOCK = threading.RLock() if _module is None else _module.weight_lock

# Calls that put a base back. An operation in Python enters its own before it writes base + delta, and takes it out when
# the base is back, so that whatever ends it early, the next one that takes the lock can finish its work.
unfinished: list[Callable[[], None]] = []


def finish_interrupted() -> None:
    """Put back every base that an interrupted operation left out. Call it under LOCK; twice is as good as once."""
    while unfinished:
        unfinished[-1]()
        unfinished.pop()


# A child process gets the weights as they are at the fork and no thread that would finish an operation: fork between
# operations. Waiting here gives up the GIL, so that the thread that holds the lock can go on.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


@contextmanager
def stable_weights() -> Iterator[None]:
    """Inside this context no operation of s2ft in this process has base + delta in a weight.

    While an attached model runs, its weights hold base + delta for the length of one matrix product, and the base at
    all other times. Code of one thread never sees that. A second thread does, if it reads weights while the first runs
    the model: an exporter, an average of weights, a checkpoint that is written in the background. Such a reader takes
    its copies inside this context. s2ft's own functions (merge, save, state_dict, deepcopy, pickling) do so themselves.

    Operations of other threads wait until the context ends, so copy first and write files afterwards. The same thread
    may enter it twice, and may run the model inside. Do not run a backward on a GPU inside: it runs in another thread,
    and would wait for ever. On GPUs the context waits for the work under way, at both ends.

    It says nothing about other processes: weights in shared memory are refused.

    Example::

        with s2ft.stable_weights():
            snapshot = {name: p.detach().clone() for name, p in model.named_parameters()}
    """
    with LOCK:
        finish_interrupted()
        _wait_for_gpus()
        try:
            yield
        finally:
            _wait_for_gpus()


def _wait_for_gpus() -> None:
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
