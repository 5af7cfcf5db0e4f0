"""A process group of the trainer and the engine's workers, apart from the groups that either has.

The trainer is rank 0, the workers are the ranks after it. On GPUs the group uses NCCL, else gloo.
"""

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 600.0  # seconds that the group waits for its members


class Group:
    """A group that has been joined.

    Attributes:
        rank: This process's rank; the trainer has 0.
        world_size: The trainer and all workers.
    """

    def __init__(self, backend: Any, store: dist.Store, rank: int, world_size: int) -> None:
        self._backend, self._store = backend, store  # the store lives as long as the group
        self.rank, self.world_size = rank, world_size
        self._last: Any = None  # the broadcast that was begun last

    def broadcast(self, tensor: Tensor, timeout: float = TIMEOUT) -> None:
        """Send the trainer's numbers to all workers. Every member must call this with a tensor of one size and dtype.

        Args:
            tensor: The numbers, contiguous; on a worker they are overwritten.
            timeout: Seconds to wait for the other members.

        Raises:
            RuntimeError: A member did not call in time, or has ended.
        """
        self.begin_broadcast(tensor).wait(timedelta(seconds=timeout))

    def begin_broadcast(self, tensor: Tensor) -> Any:
        """Start :meth:`broadcast`. Returns what the caller waits for (`wait`, `is_completed`)."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._last = self._backend.broadcast([tensor], options)
        return self._last

    def leave(self) -> None:
        """End what is under way and leave the group."""
        held, last = [self._backend, self._store], self._last
        self._backend = self._store = self._last = None
        if last is None or last.is_completed():  # a thread would be cut off where the process ends now
            _free(held)
        else:  # gloo waits for an unfinished broadcast when it is freed, until its timeout
            threading.Thread(target=_free, args=(held,), daemon=True).start()


def _free(held: list[Any]) -> None:
    if hasattr(held[0], "abort"):
        held[0].abort()
    held.clear()


def join(transport: Mapping[str, Any], rank: int, device: torch.device, timeout: float = TIMEOUT) -> Group:
    """Join the group of a trainer and its engine. All members must call this at the same time.

    Args:
        transport: `master_address` and `master_port`, where the trainer waits, and `world_size`.
        rank: Rank of this process. Worker n of an engine has `rank_offset` + n.
        device: Device of the numbers: NCCL is used for a GPU, gloo for the CPU.
        timeout: Seconds to wait for the other members.

    Returns:
        The group.

    Raises:
        RuntimeError: The trainer can't be reached, or a member did not come in time.
    """
    world_size, wait = int(transport["world_size"]), timedelta(seconds=timeout)
    store = dist.TCPStore(
        transport["master_address"],
        int(transport["master_port"]),
        world_size,
        is_master=rank == 0,
        timeout=wait,
        wait_for_workers=False,
    )
    inner = dist.PrefixStore("s2ft", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = dist.ProcessGroupNCCL(inner, rank, world_size, wait)
    else:
        backend = dist.ProcessGroupGloo(inner, rank, world_size, wait)
    return Group(backend, store, rank, world_size)
