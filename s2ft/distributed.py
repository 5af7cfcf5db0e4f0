"""Several ranks: agreeing on what is trained, and tensors of which every rank holds a part.

Under DDP every rank holds everything. FSDP2 and ZeRO-3 leave each rank a part of every parameter, and ZeRO the only
exact copy of what is trained in its optimizer. What reads such parameters gathers them, so that every rank must call
it; each rank writes its own part.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn

RANK_TIMEOUT = timedelta(minutes=10)  # NCCL's own
_counts: Counter = Counter()  # of meetings, so that each has a key of its own; the same on every rank


# ---- agreeing ------------------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_same_as_first_rank(what: str, values: Mapping[str, str]) -> None:
    """Compare with the rank that came first, without waiting for any: a rank that does this alone is not stuck, and
    of ranks that differ all but the first raise. It goes through the process group's store, so that it needs no
    device, which before a model is moved many have not chosen.

    Args:
        what: compared is the nth time that each rank says it. values: by what they are, in words.
    Raises: RuntimeError that names what differs, with both values.
    """
    if not is_distributed():
        return
    _counts[what] += 1
    mine = json.dumps({"rank": dist.get_rank(), **values})
    first = json.loads(_store().compare_set(f"s2ft/{what}/{_counts[what]}", "", mine))
    for name, value in values.items():
        if first[name] != value:
            raise RuntimeError(
                f"{what}: {name} is {value} on rank {dist.get_rank()} and {first[name]} on rank "
                f"{first['rank']}, and must be the same on all: give every rank the same base and data, "
                "or one selection as units. Ranks that train different adapters on purpose give them "
                "different names"
            )


def should_print(text: str) -> bool:
    """Whether this rank should print `text`: of ranks with the same text one does, without waiting for the others.

    Before the ranks have joined, the first one of each machine does.
    """
    if not is_distributed():
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return not launched or os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store().add(f"s2ft/said/{text}", 1) == 1
    except RuntimeError:  # the store's process has ended
        return True


def check_all_ranks_agree(what: str, value: str) -> None:
    """Every rank calls this with its own value. Raises: RuntimeError on every rank, if not all have the same."""
    if not is_distributed():
        return
    ranks = list(range(dist.get_world_size()))
    key = wait_for_ranks(f"comparison of {what}", ranks, value)
    values = [_store().get(f"{key}/{rank}").decode() for rank in ranks]
    if len(set(values)) > 1:
        others = next(rank for rank in ranks if values[rank] != values[0])
        raise RuntimeError(
            f"the ranks differ in their {what} ({len(set(values))} on {len(ranks)} ranks): "
            f"{values[0]} on rank 0, {values[others]} on rank {others}"
        )


def wait_for_ranks(what: str, ranks: list[int], value: str = "") -> str:
    """Wait until each of `ranks` is here. Returns: the store's key under which each left its value, by rank.

    Raises: RuntimeError that names who didn't come within RANK_TIMEOUT; NCCL would abort, gloo be stuck for longer.
    """
    said = f"s2ft/{what}/{ranks[0]}+{len(ranks)}"
    _counts[said] += 1
    key, store, me = f"{said}/{_counts[said]}", _store(), dist.get_rank()
    store.set(f"{key}/{me}", value)
    for rank in ranks:
        try:
            store.wait([f"{key}/{rank}"], RANK_TIMEOUT)
        except dist.DistError as error:
            store.delete_key(f"{key}/{me}")
            _counts[said] -= 1  # so that the next time all come they meet
            raise RuntimeError(
                f"{what}: rank {me} waited {RANK_TIMEOUT.total_seconds():g} s for rank {rank}: every "
                "rank must call this, not one alone"
            ) from error
    return key


def run_on_first_rank(what: str, ranks: list[int] | None, act: Callable[[], None]) -> None:
    """The first of `ranks` acts, the others wait until it has done so. ranks: None where each is on its own.

    Raises: on the first rank what `act` raises, on the others RuntimeError with its words.
    """
    if ranks is None:
        act()
        return
    failure = ""
    if dist.get_rank() == ranks[0]:
        try:
            act()
        except BaseException as error:
            wait_for_ranks(what, ranks, f"{type(error).__name__}: {error}")
            raise
    failure = _store().get(f"{wait_for_ranks(what, ranks)}/{ranks[0]}").decode()
    if failure:
        raise RuntimeError(f"rank {ranks[0]} failed: {failure}")


def _store():
    return dist.distributed_c10d._get_default_store()


# ---- tensors of which each rank holds a part -----------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__name__ == "DTensor"  # known by name: the class takes half a second to import


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor) -> bool:
    return is_dtensor(tensor) or is_partitioned(tensor)


def has_master_copy(tensor: Tensor) -> bool:
    """Whether ZeRO's optimizer holds the exact values of this parameter, and would write it over."""
    return hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer")


def reshard_all(model: nn.Module) -> None:
    """Have FSDP2 give up what it gathered for a forward and kept, so that parameters are what is trained again."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not dist.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def ranks_sharing(tensors: Iterable[Tensor]) -> list[int] | None:
    """The ranks among which parameters are spread; None where each is whole here."""
    for tensor in tensors:
        if is_dtensor(tensor):
            return sorted(tensor.device_mesh.mesh.flatten().tolist())
        if is_partitioned(tensor):
            return sorted(dist.get_process_group_ranks(tensor.ds_process_group))
        if has_master_copy(tensor):
            return sorted(dist.get_process_group_ranks(tensor._dp_group))
    return None


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of each, detached, in what precision it is trained; of the parameters that are spread over ranks a copy.

    Every rank of those must call this. Raises: RuntimeError where one does not come.
    """
    ranks = ranks_sharing(tensors.values())
    if ranks is not None:
        wait_for_ranks("gathering what is trained", ranks)
    return {name: _full_tensor(tensor) for name, tensor in tensors.items()}


def _full_tensor(tensor: Tensor) -> Tensor:
    if is_dtensor(tensor):  # offloaded ones are gathered on the device by which the ranks talk
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    if has_master_copy(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    with gathered_parameter(tensor):
        return tensor.detach().clone() if is_partitioned(tensor) else tensor.detach()


def write_units(tensor: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    """``tensor.index_copy_(dim, index, values)`` of a parameter; where it is spread over ranks, each writes its part.

    Under ZeRO every rank must call this.
    """
    if is_dtensor(tensor):
        part = own_shard(tensor)
        index, values = part.restrict(index, values, dim)
        part.tensor.index_copy_(dim, index.to(part.tensor.device), values.to(part.tensor))
        return
    ranks = ranks_sharing([tensor])
    if ranks is not None:
        wait_for_ranks("loading into what is trained", ranks)
    full = _full_tensor(tensor)
    full.index_copy_(dim, index.to(full.device), values.to(full))
    if has_master_copy(tensor):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(tensor, full)
    if ranks is not None:
        with gathered_parameter(tensor):
            tensor.data.copy_(full)


@contextmanager
def gathered_parameter(tensor: Tensor) -> Iterator[None]:
    """Inside, a parameter of ZeRO-3 is whole; every rank must come, and what the first writes to it stays."""
    if not is_partitioned(tensor):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        yield


@dataclass
class Shard:
    """This rank's part of a tensor, in its own memory, and where in the whole it begins, by dimension."""

    tensor: Tensor
    start: list[int] | None = None  # None: this is the whole

    @property
    def is_full(self) -> bool:
        return self.start is None

    def restrict(self, index: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Of values at an index along dim of the whole those that lie in this part; before them where in it."""
        if self.is_full:
            return index, values
        at = index - self.start[dim]
        here = ((at >= 0) & (at < self.tensor.shape[dim])).nonzero().squeeze(1)
        values = values.index_select(dim, here.to(values.device))
        for other in (other for other in range(len(self.start)) if other != dim):
            values = values.narrow(other, self.start[other], self.tensor.shape[other])
        return at[here], values


def own_shard(tensor: Tensor) -> Shard:
    """Of a DTensor. Every rank has as many rows, rounded up, and the last ones what is left."""
    start = [0] * tensor.dim()
    for of_mesh, placement in enumerate(tensor.placements):
        if placement.is_shard():
            size, mesh = tensor.shape[placement.dim], tensor.device_mesh
            start[placement.dim] = min(size, mesh.get_local_rank(of_mesh) * -(-size // mesh.size(of_mesh)))
    return Shard(tensor.detach().to_local(), start)
