"""Several ranks: checks that they train the same, and tensors that are spread over them.

Under DDP every rank has every parameter in full. Under FSDP2 and ZeRO-3 each rank has a shard of every parameter, and
ZeRO's optimizer has the only exact copy of trained parameters. A function that reads such parameters gathers them, so
every rank must call it. Each rank writes its own shard.

FSDP2 shards a tensor, tensor parallelism splits it, ZeRO-3 partitions it. It is spread in each of these cases, which
:func:`is_spread` asks for.

FSDP2 keeps a list of the parameters it shards and of the module that has each of them. It puts the shard or the
gathered parameter into that module whenever it changes between the two. So a trainable layer that takes a frozen weight
over has to take the module's place in that list. Its s2 has to be on the list too, to be sharded and to get its
gradient reduced over the ranks: it joins the group of the frozen weight, and is gathered and reduced with its block.

PyTorch has no public way for either. The private names that are needed are looked up in this module only. They are the
same in torch 2.11 to 2.15.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2ft.foreign import check_mentioned, read

LONGEST_PAUSE = 0.5  # seconds between two looks at the store
_counts: Counter = Counter()  # calls by name, the same on every rank: they number the keys in the store


# ---- agreeing ------------------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_ranks() -> list[int] | None:
    """All ranks, or None if this process is not one of several."""
    return list(range(dist.get_world_size())) if is_distributed() else None


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
    first = json.loads(group_store().compare_set(f"s2ft/{what}/{_counts[what]}", "", mine))
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
        return int(os.environ.get("WORLD_SIZE", "1")) <= 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return group_store().add(f"s2ft/printed/{text}", 1) == 1
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
    ranks = all_ranks()
    if ranks is None:
        return
    key = wait_for_ranks(f"comparison of {what}", ranks, value)
    values = [group_store().get(f"{key}/{rank}").decode() for rank in ranks]
    if len(set(values)) > 1:
        differing = next(rank for rank in ranks if values[rank] != values[0])
        raise RuntimeError(
            f"the ranks differ in their {what} ({len(set(values))} on {len(ranks)} ranks): "
            f"{values[0]} on rank 0, {values[differing]} on rank {differing}"
        )


def wait_for_ranks(what: str, ranks: list[int] | None, value: str = "") -> str:
    """Wait until each of `ranks` has called this.

    Args:
        what: Name of the call, for the key and the message.
        ranks: Ranks that must call it. None: this rank is alone.
        value: Text that this rank leaves in the store.

    Returns:
        The key in the store under which each rank has left its value: `key/rank`.

    Raises:
        RuntimeError: A rank has not called this within the timeout of the process group, or the store has ended.
    """
    if ranks is None:
        return ""
    call = f"s2ft/{what}/{'-'.join(map(str, ranks))}"
    _counts[call] += 1
    key, store, me = f"{call}/{_counts[call]}", group_store(), dist.get_rank()
    with _explain_lost_store(what):
        store.set(f"{key}/{me}", value)
        if not _wait(lambda: store.check([f"{key}/{rank}" for rank in ranks])):
            missing = next(rank for rank in ranks if not store.check([f"{key}/{rank}"]))
            store.delete_key(f"{key}/{me}")
            _counts[call] -= 1  # so that the next call of all ranks has the same number
            raise RuntimeError(f"{what}: rank {me} waited for rank {missing}: {_why_lost()}")
    return key


def _wait(is_done: Callable[[], bool]) -> bool:
    """Wait until something is done, for at most the timeout of the process group. Returns whether it is."""
    start, limit = time.monotonic(), group_store().timeout.total_seconds()  # type: ignore[attr-defined]
    while not is_done():  # no interrupt would end store.wait
        waited = time.monotonic() - start
        if waited > limit:
            return is_done()
        time.sleep(min(LONGEST_PAUSE, 0.001 + waited / 10))
    return True


def _why_lost() -> str:
    return (
        f"it did not call this within {group_store().timeout.total_seconds():g} s. "  # type: ignore[attr-defined]
        "Its process has ended, or it works for longer (raise the timeout of init_process_group, --ddp-timeout), or "
        "one rank called this alone: every rank must call this"
    )


@contextmanager
def _explain_lost_store(what: str) -> Iterator[None]:
    try:
        yield
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"{what}: rank {dist.get_rank()} can't reach the store of the ranks: the process that has it, rank 0 or "
            "the launcher's agent, has ended"
        ) from error


def run_on_ranks(what: str, ranks: list[int] | None, runs: bool, act: Callable[[], None]) -> None:
    """Run a function on some of the ranks that call this, while the others wait until it has ended everywhere.

    Args:
        what: Name of the call, for messages.
        ranks: Ranks that call this. None: this rank calls it by itself.
        runs: Whether this rank runs the function.
        act: The function. It may take as long as the timeout of the process group.

    Raises:
        Exception: Any exception of `act`, on the rank that ran it.
        RuntimeError: `act` failed on another rank, or a rank has ended or did not call in time.
    """
    try:
        if runs:
            act()
    except BaseException as error:
        wait_for_ranks(what, ranks, f"{type(error).__name__}: {error}")
        raise
    key = wait_for_ranks(what, ranks)
    for rank in ranks or ():
        failure = group_store().get(f"{key}/{rank}").decode()
        if failure:
            raise RuntimeError(f"rank {rank} failed: {failure}")


def run_on_first_rank(what: str, ranks: list[int] | None, act: Callable[[], None]) -> None:
    """Run a function on the first of several ranks while the others wait for it, as :func:`run_on_ranks` does."""
    run_on_ranks(what, ranks, ranks is None or dist.get_rank() == ranks[0], act)


class Decision(NamedTuple):
    """A value that :func:`decide` found.

    Attributes:
        value: The value; None if no rank could compute it.
        key: Where the ranks have left it in the store; empty if there is only one rank.
    """

    value: Any
    key: str

    @property
    def is_for_others(self) -> bool:
        """Whether another rank has asked for the value so far because it can't compute it."""
        return bool(self.key) and group_store().add(f"{self.key}/asked", 0) > 0


def decide(what: str, is_able: bool, compute: Callable[[], Any]) -> Decision:
    """Compute a value on the ranks that can compute it, and give it to those that can't.

    A rank that can compute it does not wait for any rank, and is not compared with others: use
    :func:`check_same_as_first_rank` for that. A rank that can't takes the value of the first rank that could.

    Args:
        what: Name of the value, for the key and for messages. The nth call with this name on each rank belong together.
        is_able: Whether this rank can compute the value: mostly whether its model has the numbers.
        compute: Returns the value, of types that JSON has. It may take as long as the timeout of the process group. If
            the weights are sharded, it runs on all of their ranks.

    Returns:
        The :class:`Decision`, whose value is None if no rank can compute it.

    Raises:
        Exception: Any exception of `compute`, on a rank that runs it.
        RuntimeError: `compute` failed on the rank that this one waits for, or that rank has ended, or no rank that can
            compute the value did call in time.
    """
    if not is_distributed():
        return Decision(compute() if is_able else None, "")
    call = f"decision on {what}"
    _counts[call] += 1
    key, store = f"s2ft/{call}/{_counts[call]}", group_store()
    if not is_able:
        return Decision(_decided(what, key), key)
    rank = str(dist.get_rank())
    leads = store.compare_set(f"{key}/by", "", rank).decode() == rank
    try:
        value = compute()
    except BaseException as error:
        if leads:
            store.set(key, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    if leads:
        store.set(key, json.dumps({"value": value}))
    return Decision(value, key)


def _decided(what: str, key: str) -> Any:
    """Wait for the value that a rank leaves at `key`; None if no rank is able to compute it."""
    store, asked = group_store(), f"{key}/asked"

    def by() -> int | None:
        return int(store.get(f"{key}/by")) if store.check([f"{key}/by"]) else None

    with _explain_lost_store(what):
        store.add(asked, 1)
        if not _wait(lambda: store.check([key]) or store.add(asked, 0) == dist.get_world_size()):
            raise RuntimeError(
                f"{what}: rank {dist.get_rank()} can't find it itself and waited for "
                f"{'a rank that can' if by() is None else f'rank {by()}'}: {_why_lost()}"
            )
        if not store.check([key]):
            return None
    found = json.loads(store.get(key))
    if "error" in found:
        raise RuntimeError(f"rank {by()} failed: {found['error']}")
    return found["value"]


def group_store() -> dist.Store:
    """The store of the process group."""
    return dist.distributed_c10d._get_default_store()


# ---- tensors that are spread over ranks ----------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> TypeGuard[Any]:
    """Whether FSDP2 or tensor parallelism holds this tensor."""
    return type(tensor).__name__ == "DTensor"  # known by name: the class takes half a second to import


def is_partitioned(tensor: Tensor) -> TypeGuard[Any]:
    """Whether ZeRO-3 holds this parameter.

    Raises:
        MissingForeignName: The installed DeepSpeed marks such parameters in another way.
    """
    zero = sys.modules.get("deepspeed.runtime.zero.partition_parameters")  # without it no parameter is partitioned
    if zero is None:
        return False
    for name in ("ds_id", "ds_shape", "ds_numel"):
        check_mentioned(zero.Init, name, "deepspeed", "parameters that ZeRO-3 has partitioned")
    return hasattr(tensor, "ds_id")


def is_spread(tensor: Tensor) -> bool:
    """Whether this tensor is spread over ranks."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor in full. While ZeRO-3 has partitioned a parameter, its own shape is empty."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a parameter can be read: here, spread over ranks, or from a file (`_s2ft_values`)."""
    return not tensor.is_meta or hasattr(tensor, "_s2ft_values")


@contextmanager
def full_values(tensor: Tensor) -> Iterator[Tensor]:
    """Inside, the complete values of a parameter or buffer, detached. They must not be written.

    They are in the tensor's own memory if it is complete here. If it is spread over ranks, every one of these ranks
    must call this, for the same tensors in the same order: the values are gathered, and freed afterwards.

    Raises:
        ValueError: The tensor is on the meta device, and its values are in no file.
    """
    if tensor.is_meta:
        if not has_values(tensor):
            raise ValueError(
                "a weight is on the meta device, so it has no values yet: load the weights first, or call this on all "
                "ranks, one of which has them"
            )
        yield cast(Any, tensor)._s2ft_values().detach()
    elif is_dtensor(tensor):
        yield full_tensor(tensor)
    else:
        with gathered_parameter(tensor, read_only=True):
            yield tensor.detach()


@contextmanager
def without_zero_init() -> Iterator[None]:
    """Inside, transformers builds models in full. While a config of ZeRO-3 lives, it would partition each new one."""
    transformers = sys.modules.get("transformers.integrations.deepspeed")
    if transformers is None or not transformers.is_deepspeed_zero3_enabled():
        yield
        return
    config = transformers._hf_deepspeed_config_weak_ref()  # transformers gives out only what is in it
    transformers.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers.set_hf_deepspeed_config(config)


def check_not_in_engine(model: nn.Module, what: str, removes: bool = False) -> None:
    """Raise ValueError if DeepSpeed's engine holds the model.

    Args:
        model: The model.
        what: The change, for the message.
        removes: Whether the change only takes layers away. ZeRO-1 and ZeRO-2 leave the weights whole, so that a model
            can be taken out of their engines.
    """
    if _is_in_zero3(model) or (not removes and any(map(has_master_copy, model.parameters()))):
        raise ValueError(
            f"{what} would change the layers of a model that DeepSpeed's engine holds, and its hooks and its optimizer "
            "know only what was there when deepspeed.initialize made them: do this before deepspeed.initialize (before "
            "Trainer.train, or accelerator.prepare), or call s2ft.save_adapter now and go on with a new model"
        )


def _is_in_zero3(model: nn.Module) -> bool:
    """Whether the engine of ZeRO-3 holds a model: it gives every module a dict of parameters of its own class."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is None:
        return False
    kind = read(offload, "ZeROOrderedDict", "deepspeed", "models that the engine of ZeRO-3 holds")
    return any(isinstance(module._parameters, kind) for module in model.modules())


def has_master_copy(tensor: Tensor) -> TypeGuard[Any]:
    """Whether ZeRO's optimizer has the exact values of this parameter, and would overwrite the parameter with them.

    Raises:
        MissingForeignName: The installed DeepSpeed marks such parameters in another way.
    """
    purpose = "parameters of which ZeRO's optimizer has the exact values"
    links = sys.modules.get("deepspeed.utils.mixed_precision_linkage")  # stages 1 and 2 use it
    if links is not None:
        check_mentioned(links.link_hp_params, "_hp_mapping", "deepspeed", purpose)
        if hasattr(tensor, "_hp_mapping"):
            return True
    stage3 = sys.modules.get("deepspeed.runtime.zero.stage3")
    if stage3 is None:
        return False
    check_mentioned(stage3.DeepSpeedZeroOptimizer_Stage3, "_z3_optimizer", "deepspeed", purpose)
    # ZeRO-3 marks frozen parameters too, and has no copy of them.
    return hasattr(tensor, "_z3_optimizer") and tensor.requires_grad


def will_be_loaded_again() -> bool:
    """Whether accelerate will send the model of each rank to the meta device, shard it, and load it from the first one.

    That is FSDP2 with cpu_ram_efficient_loading. The units of weights need not move before it: the first rank would
    need copies of the weights in the base's order.
    """
    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    wanted = all(os.environ.get(name, "").lower() in ("1", "true", "yes") for name in names)
    return wanted and os.environ.get("FSDP_VERSION", "1") == "2" and is_distributed()


def reads_weights() -> bool:
    """Whether this rank may read the values of weights that are not spread over ranks.

    If they will be loaded again from the first rank, only the first rank of each machine reads them: on the others they
    may be any values, and reading a file that is mapped into memory would take the memory that is to be saved.
    """
    return not will_be_loaded_again() or os.environ.get("LOCAL_RANK", "0") == "0"


def reshard_all(model: nn.Module) -> None:
    """Make FSDP2 free the full parameters that it kept after a forward, so that the trained shards are used again."""
    for module in fsdp_modules(model):
        module.reshard()


def reshard_after_run(model: nn.Module) -> None:
    """As :func:`reshard_all`, also after a forward that has failed, where FSDP2 would keep the root's parameters."""
    for group in _groups(model):
        group._training_state = type(group._training_state).IDLE
    reshard_all(model)


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
    wait_for_ranks("gathering what is trained", ranks_sharing(tensors.values()))
    return {name: full_tensor(tensor) for name, tensor in tensors.items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """Return one tensor in full, as :func:`full_tensors` does, without waiting for ranks that are late."""
    if is_dtensor(tensor):  # an offloaded tensor is gathered on the device of the ranks' mesh
        return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()
    if has_master_copy(tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(tensor)
    if not is_partitioned(tensor):
        return tensor.detach()
    with gathered_parameter(tensor):
        return tensor.detach().clone()


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
    wait_for_ranks("loading into what is trained", ranks)
    full = full_tensor(tensor)
    full.index_copy_(dim, index.to(full.device), values.to(full))
    if has_master_copy(tensor):
        _write_master_copy(tensor, full)
    if ranks is not None:
        with gathered_parameter(tensor):
            tensor.data.copy_(full)


def _write_master_copy(tensor: Tensor, full: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if is_partitioned(tensor):  # by the own part, because DeepSpeed cuts a full value only if all parts are equal
        size = tensor.ds_tensor.numel()  # the last parts are filled up with zeros
        part = full.flatten()[size * dist.get_rank(tensor.ds_process_group) :][:size]
        safe_set_local_fp32_param(tensor, torch.cat([part, part.new_zeros(size - part.numel())]))
    else:
        safe_set_full_fp32_param(tensor, full)


def gathered_parameter(tensor: Tensor, read_only: bool = False) -> AbstractContextManager:
    """Inside, a parameter of ZeRO-3 is complete. Every rank must enter; the values that the first rank writes stay.

    Args:
        tensor: Any parameter; nothing happens for one that is not of ZeRO-3.
        read_only: Whether nothing is written inside.
    """
    if not is_partitioned(tensor):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=None if read_only else 0)


@dataclass
class Shard:
    """This rank's shard of a tensor.

    Attributes:
        tensor: The shard, in its own memory.
        start: Index in the full tensor at which the shard begins, by dimension; None if this is the full tensor. Where
            the shard is no single range (packed weights under tensor parallelism): all its indices, [n] int64.
    """

    tensor: Tensor
    start: Sequence[int | Tensor] | None = None

    def restrict(self, index: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Restrict (index, values) of the full tensor to this shard.

        Args:
            index: Rows or columns of the full tensor, shape [n], int64.
            values: Values there: n along `dim`.
            dim: Dimension of the index.

        Returns:
            The index within the shard, and the values at it.
        """
        if self.start is None:
            return index, values
        local, is_inside = self.find(index.cpu(), dim)
        inside = is_inside.nonzero().squeeze(1)
        values = values.index_select(dim, inside.to(values.device))
        for other in (other for other in range(len(self.start)) if other != dim):
            values = self._cut_along(values, other)
        return local[inside], values

    def find(self, index: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Find rows or columns of the full tensor in this shard.

        Args:
            index: Rows or columns of the full tensor, shape [n], int64.
            dim: Dimension of the index.

        Returns:
            The index within the shard, [n] int64, and which of its entries are in the shard, [n] bool.
        """
        start, size = 0 if self.start is None else self.start[dim], self.tensor.shape[dim]
        if not isinstance(start, Tensor):
            return index - start, (index >= start) & (index < start + size)
        local = torch.searchsorted(start, index.contiguous()).clamp(max=max(0, size - 1))
        return local, start[local] == index if size else torch.zeros_like(index, dtype=torch.bool)

    def cut(self, full: Tensor) -> Tensor:
        """The part of a tensor of the full shape that this shard has."""
        for dim in range(full.dim()) if self.start is not None else ():
            full = self._cut_along(full, dim)
        return full

    def _cut_along(self, full: Tensor, dim: int) -> Tensor:
        start = 0 if self.start is None else self.start[dim]
        if isinstance(start, Tensor):
            return full.index_select(dim, start.to(full.device))
        return full.narrow(dim, start, self.tensor.shape[dim])


def local_part(tensor: Tensor) -> Tensor:
    """The rank's own part of a DTensor, in its own memory. Inside some styles of transformers it is here already."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def own_shard(tensor: Tensor) -> Shard:
    """Return this rank's shard of a DTensor, of any mesh and placements, or all of another tensor."""
    if not is_dtensor(tensor):
        return Shard(tensor.detach())
    shard = tensor.detach().to_local()
    return Shard(shard, [_own_start(tensor, dim, shard.shape[dim]) for dim in range(tensor.dim())])


def own_shards(tensor: Tensor) -> list[Shard]:
    """Return what this process owns of a tensor, as blocks of it in their own memory. Nothing is gathered.

    A part of ZeRO-3 is a range of the flattened tensor: some rows, and pieces of the first and the last one. Dimensions
    after the third count as one.
    """
    if not is_partitioned(tensor):
        return [own_shard(tensor)]
    shape = [*tensor.ds_shape[:2], tensor.ds_shape[2:].numel()] if len(tensor.ds_shape) > 2 else [*tensor.ds_shape]
    part = tensor.ds_tensor.detach()
    first = part.numel() * dist.get_rank(tensor.ds_process_group)
    last = min(first + part.numel(), math.prod(shape))
    return [
        Shard(part[flat - first : flat - first + math.prod(sizes)].view(sizes), start)
        for flat, start, sizes in _blocks_of_range(first, last, shape)
    ]


def _blocks_of_range(first: int, last: int, shape: list[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """Cut a range of a flattened tensor into blocks: yield where each begins in the range, its start, and its shape."""
    if first >= last:
        return
    inner = math.prod(shape[1:])
    if len(shape) == 1:
        yield first, [first], [last - first]
        return
    row = first // inner
    whole = -(-first // inner), last // inner
    if first % inner or whole[0] >= whole[1]:  # a piece of one row
        end = min(last, (row + 1) * inner)
        for flat, start, sizes in _blocks_of_range(first - row * inner, end - row * inner, shape[1:]):
            yield flat + row * inner, [row, *start], [1, *sizes]
        yield from _blocks_of_range(end, last, shape)
    else:
        yield first, [whole[0], *[0] * (len(shape) - 1)], [whole[1] - whole[0], *shape[1:]]
        yield from _blocks_of_range(whole[1] * inner, last, shape)


def release_gathered(tensor: Tensor) -> None:
    """Free the full values that ZeRO-3 has of a parameter whose own part was written. It gathers them again."""
    if is_partitioned(tensor) and tensor.numel() == tensor.ds_numel:
        tensor.partition()


def _own_start(tensor: Any, dim: int, length: int) -> int | Tensor:
    """Where this rank's shard of a DTensor begins along a dimension; all its indices if it is no single range."""
    mesh, size = tensor.device_mesh, tensor.shape[dim]
    cutting = [axis for axis, placement in enumerate(tensor.placements) if is_cut(placement, dim)]
    if not cutting:
        return 0
    if len(cutting) == 1 and not _is_strided(tensor.placements[cutting[0]]):
        # equal shares, rounded up; the last ranks have the rest
        return min(size, mesh.get_local_rank(cutting[0]) * -(-size // mesh.size(cutting[0])))
    own = torch.arange(size)
    for axis in cutting:
        own = cut_by(tensor.placements[axis], own, mesh.size(axis))[mesh.get_local_rank(axis)]
    if own.numel() and not torch.equal(own, torch.arange(int(own[0]), int(own[0]) + length)):
        return own
    return int(own[0]) if own.numel() else size


def is_cut(placement: Any, dim: int | None = None) -> bool:
    """Whether a placement of a DTensor cuts it along a dimension; None: along any."""
    # is_shard does not count _StridedShard
    return (placement.is_shard() or _is_strided(placement)) and dim in (None, placement.dim)


def _is_strided(placement: Any) -> bool:
    """Whether a placement cuts a dimension group by group."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def cut_by(placement: Any, elements: Tensor, ranks: int) -> list[Tensor]:
    """Cut elements [n] as a placement of a DTensor cuts them along its dimension, into one part for each rank.

    A packed weight (gate and up in one) is cut group by group.
    """
    groups = placement.split_factor if _is_strided(placement) else 1
    pieces = [_chunks(group, ranks) for group in _chunks(elements, groups)]
    return [torch.cat([piece[rank] for piece in pieces]) for rank in range(ranks)]


def _chunks(elements: Tensor, count: int) -> list[Tensor]:
    """Cut into equal chunks, rounded up. The last ones are shorter, or empty."""
    return [*elements.chunk(count), *[elements[:0]] * count][:count]


def sum_over_shards(values: Tensor, like: Any, dim: int | None = None) -> Tensor:
    """Sum values over the ranks that have other shards of a DTensor. Every one of them must call this.

    Args:
        values: Any values of this rank, contiguous. Each element that is not of integers may be other than zero on one
            rank only: their bytes are summed, so that the sum is exact.
        like: The DTensor.
        dim: Sum over the ranks with other parts along this dimension; None: along any.

    Returns:
        The sums, the same on each of these ranks.
    """
    axes = [axis for axis, placement in enumerate(like.placements) if is_cut(placement, dim)]
    found = values.to(like.device_mesh.device_type)
    for axis in axes:
        summed = found if found.dtype == torch.int64 else found.view(-1).view(torch.uint8)
        dist.all_reduce(summed, group=like.device_mesh.get_group(axis))
    return found.to(values.device)


def elements_of(tensor: Tensor, positions: Tensor) -> Tensor:
    """Read elements of a DTensor. Every rank that has a shard must call this.

    Args:
        tensor: The DTensor.
        positions: Numbers of the elements, counted as in the flattened full tensor, [n] int64.

    Returns:
        The elements [n], on the device of the shard.
    """
    shard = own_shard(tensor)
    inside, local = torch.ones_like(positions, dtype=torch.bool), []
    for dim, place in enumerate(torch.unravel_index(positions, tuple(tensor.shape))):
        found, is_inside = shard.find(place, dim)
        local.append(found)
        inside &= is_inside
    values, inside = shard.tensor.new_zeros(positions.numel()), inside.to(shard.tensor.device)
    values[inside] = shard.tensor[tuple(place.to(shard.tensor.device)[inside] for place in local)]
    return sum_over_shards(values, tensor)


# ---- how tensor parallelism splits a weight -------------------------------------------------------------------------


@dataclass
class Split:
    """A weight [outputs, inputs] or bias [outputs] that is split over the ranks of a tensor-parallel group.

    Attributes:
        mesh: Device mesh of the group, with one dimension.
        dim: Dimension of the weight that is split.
        elements: The elements along it that each rank has, in the order of its part, a tensor [n] int64 for each rank.
    """

    mesh: Any
    dim: int
    elements: list[Tensor]

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.mesh.get_local_rank()

    @property
    def own_elements(self) -> Tensor:
        """The elements that this rank has."""
        return self.elements[self.rank]

    @cached_property
    def owners(self) -> Tensor:
        """The rank that has each element, [extent] int64."""
        owners = torch.empty(sum(part.numel() for part in self.elements), dtype=torch.int64, device="cpu")
        for rank, part in enumerate(self.elements):
            owners[part] = rank
        return owners

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks of the group. Each of them must call this."""
        total = tensor.to(self.mesh.device_type, copy=True)
        dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def local_places(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Find elements in this rank's part.

        Args:
            elements: Elements of the whole dimension, [n] int64.

        Returns:
            Which of them the rank has, as positions in `elements` [m] int64, and their places in its part [m] int64.
        """
        places = torch.full_like(self.owners, -1)
        places[self.own_elements] = torch.arange(self.own_elements.numel(), device="cpu")
        places = places[elements]
        return (places >= 0).nonzero().squeeze(1), places[places >= 0]


def split_of(tensor: Tensor) -> Split | None:
    """Describe how tensor parallelism has split a DTensor.

    FSDP2 puts its own dimensions of a mesh first, so the last dimension of the mesh is that of tensor parallelism.

    Args:
        tensor: A weight or bias of a layer that tensor parallelism runs.

    Returns:
        The split; None for a plain tensor, and for one that every rank of the group has in full.
    """
    if not is_dtensor(tensor) or tensor.placements[-1].is_replicate():
        return None
    mesh, placement = tensor.device_mesh, tensor.placements[-1]
    if mesh.ndim > 1:
        mesh = mesh[mesh.mesh_dim_names[-1]]
    dim = placement.dim % tensor.dim()
    return Split(mesh, dim, cut_by(placement, torch.arange(tensor.shape[dim], device="cpu"), mesh.size()))


# ---- FSDP2 that was applied before an adapter was attached ----------------------------------------------------------

Place = tuple[nn.Module, str]  # a module and the name that its parameter has there


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model to which FSDP2 was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not dist.is_initialized():
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def own_class(model: nn.Module) -> type[nn.Module]:
    """The class of a model without what FSDP2 has derived from it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return type(model)
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, fsdp.FSDPModule))


def _groups(model: nn.Module) -> list[Any]:
    """Every group of parameters that FSDP2 gathers together."""
    found: dict[int, Any] = {}
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        found.update({id(group): group for group in groups if group is not None})
    return list(found.values())


def managed_by_fsdp(model: nn.Module) -> set[tuple[int, str]]:
    """The parameters that FSDP2 manages, by the id of the module that has one and its name there.

    They are not told by their own ids: a parameter that was loaded is new to FSDP2 until the next forward.
    """
    places = set()
    for group in _groups(model):
        for info in (parameter._module_info for parameter in group.fsdp_params):
            places.add((id(info.module), info.param_name))
            places.update((id(module), name) for module, name in zip(info.shared_modules, info.shared_param_names))
    return places


def fsdp_follow(model: nn.Module, moved: Iterable[tuple[Place, Place]]) -> None:
    """Tell FSDP2 where parameters are now. It can be called again.

    Args:
        model: The model.
        moved: The old and the new place of each parameter.
    """
    new = {(id(module), name): there for (module, name), there in moved}
    for group in _groups(model) if new else ():
        for parameter in group.fsdp_params:
            info = parameter._module_info
            here = id(info.module), info.param_name
            info.module, info.param_name = new.get(here, (info.module, info.param_name))
            for i, (module, name) in enumerate(zip(info.shared_modules, info.shared_param_names)):
                info.shared_modules[i], info.shared_param_names[i] = new.get((id(module), name), (module, name))


def fsdp_shard_slices(model: nn.Module, layers: list[nn.Module]) -> None:
    """Shard the s2 of layers in the groups of their frozen weights. Layers without such a group stay as they are.

    Args:
        model: The model.
        layers: Trainable layers, whose weights FSDP2 manages.
    """
    wanted = {id(layer): layer for layer in layers}
    for group in _groups(model):
        inside = {id(p._module_info.module): None for p in group.fsdp_params if id(p._module_info.module) in wanted}
        has_s2 = {id(p._module_info.module) for p in group.fsdp_params if p._module_info.param_name == "s2"}
        for layer in (wanted[key] for key in inside if key not in has_s2):
            group.fsdp_params.append(_sharded_slice(group, layer))
        if inside:
            _refresh(group)


def _refresh(group: Any) -> None:
    """Let FSDP2 read the parameters of a group again, if it has since a first forward kept what it read of them."""
    first = group.fsdp_params[0]
    check_mentioned(type(first), "orig_dtype", "torch", "parameters that FSDP2 has read in a first forward")
    if hasattr(first, "orig_dtype"):
        group._init_mp_dtypes()
        getattr(group, "_init_reduce_scatter_param_order", list)()  # from PyTorch 2.15 on


def _sharded_slice(group: Any, layer: Any) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    if not layer.s2.is_meta:
        layer.s2.data = layer.s2.data.to(group.device)
    return FSDPParam(
        layer.s2,
        ParamModuleInfo(layer, "s2"),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        None,
        next(one.mp_policy for one in group.fsdp_params if one._module_info.module is layer),
        group.offload_policy,
    )


def fsdp_release_slices(model: nn.Module, layers: list[nn.Module]) -> None:
    """Undo :func:`fsdp_shard_slices`: FSDP2 forgets the s2 of these layers. It can be called again."""
    known = {id(layer) for layer in layers}
    for group in _groups(model) if known else ():
        for parameter in list(group.fsdp_params):
            if id(parameter._module_info.module) in known and parameter._module_info.param_name == "s2":
                parameter._post_load_hook_handle.remove()
                group.fsdp_params.remove(parameter)
        _refresh(group)
