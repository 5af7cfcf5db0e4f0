"""The lock that an op holds while it changes a weight, and a context for reading weights between ops.

sliced_linear and indexed_linear write base + delta into a weight for the time of one matrix product. The compiled
kernels hold a lock of the process during that time. Without compiled kernels, the PyTorch references hold a Python
lock.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from s2ft.ops._build import load

_module = load()
# Its owner may take it again. Take it by `with LOCK:`. The first step of that is one C call, so an interrupt arrives
# either before the lock is taken or inside the block that releases it.
LOCK = threading.RLock() if _module is None else _module.weight_lock

# Calls that put a base back. An operation in Python appends its call before it writes base + delta, and removes it when
# the base is back. If something ends the operation early, the next one that takes the lock finishes its work.
unfinished: list[Callable[[], None]] = []


def finish_interrupted() -> None:
    """Put back every base that an interrupted operation has not put back. Call it under LOCK, as often as you like."""
    while unfinished:
        unfinished[-1]()
        unfinished.pop()


# A child process inherits the weights as they are at the fork, but no thread that would finish an operation. Forking
# therefore waits for the lock. The wait releases the GIL, so that the thread that holds the lock can go on.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


@contextmanager
def stable_weights() -> Iterator[None]:
    """Read the weights of an attached model from a second thread. Inside this context they hold the base.

    While an attached model runs, a weight holds base + delta for the time of one matrix product, and the base at all
    other times. The thread that runs the model never sees this. A second thread that reads weights meanwhile does: an
    exporter, an average of weights, or a checkpoint written in the background. Such a thread must copy the weights
    inside this context. s2ft's own functions (merge, save, state_dict, deepcopy and pickling) already do.

    Operations of other threads wait until the context ends, so write files after it. The same thread may enter the
    context again and may run the model inside. Do not run a backward on a GPU inside: it runs in another thread and
    would wait forever. On GPUs the context waits for running work when it starts and when it ends. It does not protect
    against other processes, so s2ft refuses to train weights in shared memory.

    With ``S2FTConfig(effective="step")`` the weights hold base + delta of one optimizer step instead, in all layers.

    Returns:
        A context manager.

    Example:
        >>> report = s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1))
        >>> with s2ft.stable_weights():
        ...     snapshot = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        >>> snapshot["model.embed_tokens.weight"].shape
        torch.Size([96, 64])
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
