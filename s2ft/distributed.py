"""Several ranks: checks that they train the same, and tensors that are spread over them.

Under DDP every rank has every parameter in full. Under FSDP2 and ZeRO-3 each rank has a shard of every parameter, and
ZeRO's optimizer has the only exact copy of trained parameters. A function that reads such parameters gathers them, so
every rank must call it. Each rank writes its own shard.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANK_TIMEOUT = timedelta(minutes=10)  # as NCCL's default
_counts: Counter = Counter()  # calls by name, the same on every rank: they number the keys in the store


# ---- agreeing ------------------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_same_as_first_rank(what: str, values: Mapping[str, str]) -> None:
    """Compare values with those of the first rank that calls this, without waiting for any rank.

    A rank that calls it alone does not hang. It uses the process group's store, so it needs no device, which many
    processes have not chosen before the model is moved.

    Args:
        what: Name of the comparison. The nth call with this name on each rank is compared.
        values: Values to compare, by a description of each.

    Raises:
        RuntimeError: A value differs from that of the first rank. The message has both values.
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
    """Whether this rank should print `text`: one rank prints each text, without waiting for the others.

    Before the process group is initialized, the first rank of each machine prints.
    """
    if not is_distributed():
        launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return not launched or os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return _store().add(f"s2ft/printed/{text}", 1) == 1
    except RuntimeError:  # the process that has the store has ended
        return True


def check_all_ranks_agree(what: str, value: str) -> None:
    """Check that all ranks have the same value. Every rank must call this.

    Args:
        what: Description of the value, for the message.
        value: Value of this rank.

    Raises:
        RuntimeError: The values differ. It is raised on every rank.
    """
    if not is_distributed():
        return
    ranks = list(range(dist.get_world_size()))
    key = wait_for_ranks(f"comparison of {what}", ranks, value)
    values = [_store().get(f"{key}/{rank}").decode() for rank in ranks]
    if len(set(values)) > 1:
        differing = next(rank for rank in ranks if values[rank] != values[0])
        raise RuntimeError(
            f"the ranks differ in their {what} ({len(set(values))} on {len(ranks)} ranks): "
            f"{values[0]} on rank 0, {values[differing]} on rank {differing}"
        )


def wait_for_ranks(what: str, ranks: list[int], value: str = "") -> str:
    """Wait until each of `ranks` has called this.

    Args:
        what: Name of the call, for the key and the message.
        ranks: Ranks that must call it.
        value: Text that this rank leaves in the store.

    Returns:
        The key in the store under which each rank has left its value: `key/rank`.

    Raises:
        RuntimeError: A rank did not call within RANK_TIMEOUT. Else NCCL would abort, and gloo would hang longer.
    """
    call = f"s2ft/{what}/{ranks[0]}+{len(ranks)}"
    _counts[call] += 1
    key, store, me = f"{call}/{_counts[call]}", _store(), dist.get_rank()
    store.set(f"{key}/{me}", value)
    for rank in ranks:
        try:
            store.wait([f"{key}/{rank}"], RANK_TIMEOUT)
        except dist.DistError as error:
            store.delete_key(f"{key}/{me}")
            _counts[call] -= 1  # so that the next call of all ranks has the same number
            raise RuntimeError(
                f"{what}: rank {me} waited {RANK_TIMEOUT.total_seconds():g} s for rank {rank}: every "
                "rank must call this, not one alone"
            ) from error
    return key


def run_on_first_rank(what: str, ranks: list[int] | None, act: Callable[[], None]) -> None:
    """Run a function on the first of several ranks while the others wait for it.

    Args:
        what: Name of the call, for messages.
        ranks: Ranks that call this. None: this rank runs the function by itself.
        act: The function.

    Raises:
        Exception: Any exception of `act`, on the first rank.
        RuntimeError: `act` failed on the first rank, or a rank did not call in time.
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


# ---- tensors that are spread over ranks ----------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    """Whether FSDP2 or tensor parallelism holds this tensor."""
    return type(tensor).__name__ == "DTensor"  # known by name: the class takes half a second to import


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: Tensor) -> bool:
    """Whether this tensor is spread over ranks."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor in full. While ZeRO-3 has partitioned a parameter, its own shape is empty."""
    return getattr(tensor, "ds_shape", tensor.shape)


def has_master_copy(tensor: Tensor) -> bool:
    """Whether ZeRO's optimizer has the exact values of this parameter, and would overwrite the parameter with them."""
    return hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer")


def reshard_all(model: nn.Module) -> None:
    """Make FSDP2 free the full parameters that it kept after a forward, so that the trained shards are used again."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not dist.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def ranks_sharing(tensors: Iterable[Tensor]) -> list[int] | None:
    """Return the ranks over which parameters are spread; None if each is complete on this rank."""
    for tensor in tensors:
        if is_dtensor(tensor):
            return sorted(tensor.device_mesh.mesh.flatten().tolist())
        if is_partitioned(tensor):
            return sorted(dist.get_process_group_ranks(tensor.ds_process_group))
        if has_master_copy(tensor):
            return sorted(dist.get_process_group_ranks(tensor._dp_group))
    return None


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor in full, detached, in the precision in which it is trained.

    Tensors that are spread over ranks are gathered into copies: every one of these ranks must call this.

    Raises:
        RuntimeError: A rank did not call in time.
    """
    ranks = ranks_sharing(tensors.values())
    if ranks is not None:
        wait_for_ranks("gathering what is trained", ranks)
    return {name: _full_tensor(tensor) for name, tensor in tensors.items()}


def _full_tensor(tensor: Tensor) -> Tensor:
    if is_dtensor(tensor):  # an offloaded tensor is gathered on the device of the ranks' mesh
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    if has_master_copy(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    with gathered_parameter(tensor):
        return tensor.detach().clone() if is_partitioned(tensor) else tensor.detach()


def write_units(tensor: Tensor, index: Tensor, values: Tensor, dim: int) -> None:
    """Do ``tensor.index_copy_(dim, index, values)`` on a parameter. Each rank writes its own shard.

    Under ZeRO every rank must call this.

    Args:
        tensor: Parameter, in full or spread over ranks.
        index: Rows or columns of the full parameter, shape [n], int64.
        values: Values of the full parameter there: n along `dim`.
        dim: Dimension of the index.
    """
    if is_dtensor(tensor):
        shard = own_shard(tensor)
        index, values = shard.restrict(index, values, dim)
        shard.tensor.index_copy_(dim, index.to(shard.tensor.device), values.to(shard.tensor))
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
    """Inside, a parameter of ZeRO-3 is complete. Every rank must enter; the values that the first rank writes stay."""
    if not is_partitioned(tensor):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
        yield


@dataclass
class Shard:
    """This rank's shard of a tensor.

    Attributes:
        tensor: The shard, in its own memory.
        start: Index in the full tensor at which the shard begins, by dimension; None if this is the full tensor.
    """

    tensor: Tensor
    start: list[int] | None = None

    @property
    def is_full(self) -> bool:
        """Whether this is the full tensor."""
        return self.start is None

    def restrict(self, index: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Restrict (index, values) of the full tensor to this shard.

        Args:
            index: Rows or columns of the full tensor, shape [n], int64.
            values: Values there: n along `dim`.
            dim: Dimension of the index.

        Returns:
            The index within the shard, and the values at it.
        """
        if self.is_full:
            return index, values
        local = index - self.start[dim]
        inside = ((local >= 0) & (local < self.tensor.shape[dim])).nonzero().squeeze(1)
        values = values.index_select(dim, inside.to(values.device))
        for other in (other for other in range(len(self.start)) if other != dim):
            values = values.narrow(other, self.start[other], self.tensor.shape[other])
        return local[inside], values


def own_shard(tensor: Tensor) -> Shard:
    """Return this rank's shard of a DTensor. Ranks have equal shares, rounded up; the last ranks have the rest."""
    start = [0] * tensor.dim()
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement.is_shard():
            size, mesh = tensor.shape[placement.dim], tensor.device_mesh
            start[placement.dim] = min(size, mesh.get_local_rank(mesh_dim) * -(-size // mesh.size(mesh_dim)))
    return Shard(tensor.detach().to_local(), start)
