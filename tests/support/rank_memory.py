"""Measures the memory of one rank that trains a real model, to compare it with an estimate.

It shares no code with the estimate.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import s2ft

BEGIN, END = "s2ft: measured step begins", "s2ft: measured step ends"


def measure(
    make: Callable[[], nn.Module],
    config: s2ft.S2FTConfig,
    strategy: s2ft.Strategy | None,
    inputs: Callable[[nn.Module], dict[str, Tensor]],
    accumulation: int = 1,
    checkpointing: bool = False,
    loss: Callable | None = None,
) -> dict[str, int]:
    """Train two steps and return the bytes of the second.

    Args:
        make: Makes the model, the same on every rank.
        config: What is trained.
        strategy: How the training is spread over the ranks of the default process group.
        inputs: Makes the arguments of a forward.
        accumulation: Forwards of one step.
        checkpointing: Whether blocks run again in the backward.
        loss: Function of (model, inputs). Default: the model's own loss.

    Returns:
        "weights": parameters and buffers that this rank holds between steps. "states": gradients and optimizer states.
        "kept": bytes that autograd saves in a forward. "peak": the largest sum of everything during the second step.
    """
    kind = RUNS[strategy.name if strategy else None]
    model = kind.loaded(make, strategy)
    with kind.meter() as meter:
        model = model or make()
        s2ft.attach(model, config)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        batch = inputs(model)
        run = kind(model, strategy, accumulation)
        run.step(batch, accumulation, loss)
        states = run.states()
        run.forget()
        between = run.weights() + run.states() if meter.counts_growth else 0
        meter.begin()
        run.step(batch, accumulation, loss)
        meter.end()
    result = {"weights": run.weights(), "states": states, "peak": between + meter.peak()}
    run.forget()
    return {**result, "kept": _kept(run, batch, loss)}


class Allocations:
    """The largest number of bytes that were allocated at one time, from PyTorch's profiler.

    The profiler reports each allocation of the CPU's allocator in this thread: tensors, buffers of a reducer, storages
    that are resized.
    """

    counts_growth = False

    def __init__(self) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "Allocations":
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)

    def begin(self) -> None:
        with record_function(BEGIN):
            pass

    def end(self) -> None:
        with record_function(END):
            pass

    def peak(self) -> int:
        events = sorted(self.profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        total, most, inside = 0, 0, False
        for event in events:
            if event.name() in (BEGIN, END):
                inside = event.name() == BEGIN
                most = max(most, total)
            elif event.name() == "[memory]":
                total += event.nbytes()
                most = max(most, total) if inside else most
        return most


class Storages(TorchDispatchMode):
    """The largest number of bytes of storages that were alive at one time.

    Ranks that gather communicate in other threads, which may free a buffer. The profiler does not see that.
    """

    counts_growth = False

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = weakref.ref(storage)
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, self.total())
        return output

    def total(self) -> int:
        """Return the bytes that are alive. FSDP frees a storage by resizing it, so that sizes are read each time."""
        storages = [reference() for reference in list(self.alive.values())]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def begin(self) -> None:
        self.most = 0

    def end(self) -> None:
        self.found = self.most

    def peak(self) -> int:
        return self.found


class Growth(Storages):
    """By how much the storages that are alive grow in a step at most. Weights that were read from a file are views."""

    counts_growth = True

    def begin(self) -> None:
        self.before = self.total()
        super().begin()

    def peak(self) -> int:
        return self.found - self.before


def _kept(run: "Run", batch: dict[str, Tensor], loss: Callable | None) -> int:
    """Return the bytes that autograd saves in a forward, without weights. A storage is counted once."""
    kept: dict[int, int] = {}
    held = []  # a freed storage's address may be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        own = {_local(t).untyped_storage().data_ptr() for t in [*run.module.parameters(), *run.module.buffers()]}
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run.loss(batch, loss)  # stays alive while bytes are counted
    total = sum(kept.values())
    run.backward(output)
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensors) -> int:
    """Return the bytes of the tensors' local storages. A storage is counted once."""
    found = [_local(t.detach()).untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}.values())


def _own_bytes(model: nn.Module) -> int:
    """Return the bytes of this rank's parts. Parts that are read from a file are views of the whole file."""
    parts = [_local(tensor.detach()) for tensor in [*model.parameters(), *model.buffers()]]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


class Run:
    """Training on one device, in a plain loop."""

    meter: type = Allocations

    @staticmethod
    def loaded(make: Callable[[], nn.Module], strategy: s2ft.Strategy | None) -> nn.Module | None:
        """Return a model that must be loaded from files."""
        return None

    def __init__(self, model: nn.Module, strategy: s2ft.Strategy | None, accumulation: int) -> None:
        self.module, self.strategy = model, strategy
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.model = self.wrapped(model)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def wrapped(self, model: nn.Module) -> nn.Module:
        return model

    def loss(self, batch: dict[str, Tensor], loss: Callable | None) -> Tensor:
        return self.model(**batch).loss if loss is None else loss(self.model, batch)

    def step(self, batch: dict[str, Tensor], accumulation: int, loss: Callable | None) -> None:
        for number in range(accumulation):
            self.synchronize(number == accumulation - 1)
            self.backward(self.loss(batch, loss))
        self.optimizer.step()

    def synchronize(self, last: bool) -> None:
        """Exchange gradients in the next backward, or not."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def weights(self) -> int:
        return _bytes([*self.module.parameters(), *self.module.buffers()])

    def states(self) -> int:
        gradients = sum(_local(p.grad).nbytes for p in self.trained if p.grad is not None)
        return gradients + _bytes(value for state in self.optimizer.state.values() for value in state.values())


class DdpRun(Run):
    def wrapped(self, model: nn.Module) -> nn.Module:
        view = self.strategy.gradient_as_bucket_view
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)

    def synchronize(self, last: bool) -> None:
        self.model.require_backward_grad_sync = last


class FsdpRun(Run):
    meter = Growth

    def wrapped(self, model: nn.Module) -> nn.Module:
        return (self._by_accelerate if self.strategy.wrap == "accelerate" else self._by_hand)(model)

    def _by_hand(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        names = set(model._no_split_modules)
        for block in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(block, reshard_after_forward=self.strategy.reshard_after_forward)
        return fully_shard(model)

    def _by_accelerate(self, model: nn.Module) -> nn.Module:
        from support.fsdp_on_cpu import allow

        allow()
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import FullyShardedDataParallelPlugin

        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
            del os.environ[name]
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=self.strategy.reshard_after_forward,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        optimizer = torch.optim.AdamW(self.trained)  # accelerate takes both together
        return Accelerator(cpu=True, fsdp_plugin=plugin).prepare(model, optimizer)[0]

    def synchronize(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)

    def weights(self) -> int:
        self.model.reshard()
        for module in self.module.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return super().weights()


class TensorParallelRun(Run):
    meter = Growth

    @staticmethod
    def loaded(make: Callable[[], nn.Module], strategy: s2ft.Strategy | None) -> nn.Module:
        import torch.distributed as dist
        from transformers.distributed import DistributedConfig

        size = strategy.tp_size or dist.get_world_size()
        sizes = dict(fsdp_size=dist.get_world_size() // size) if strategy.tp_size else {}
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            make().save_pretrained(folder[0])
        dist.barrier()
        kind = type(make())
        model = kind.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=size, **sizes))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
        return model

    def weights(self) -> int:
        return _own_bytes(self.module)


class ZeroRun(Run):
    """DeepSpeed's engine. Its optimizer updates a flat partition, and it has the gradients until the step."""

    meter = Storages

    def __init__(self, model: nn.Module, strategy: s2ft.Strategy, accumulation: int) -> None:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        zero = {
            "stage": int(strategy.name[-1]),
            "reduce_bucket_size": strategy.reduce_bucket_size,
            "overlap_comm": strategy.overlap_comm,
            "stage3_prefetch_bucket_size": strategy.prefetch_bucket_size,
            "stage3_max_live_parameters": strategy.max_live_parameters,
            "stage3_max_reuse_distance": strategy.max_reuse_distance,
            "stage3_param_persistence_threshold": strategy.persistence_threshold,
        }
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": zero,
        }
        self.module = model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.engine = self.model = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.optimizer, self.gradients = self.engine.optimizer, 0
        if not self.engine.optimizer.__class__.__name__.endswith("Stage3"):
            step = self.optimizer.step
            self.optimizer.step = lambda *args, **named: (self._note_gradients(), step(*args, **named))[1]

    def _note_gradients(self) -> None:
        self.gradients = _bytes(g for group in self.optimizer.averaged_gradients.values() for g in group)

    def step(self, batch: dict[str, Tensor], accumulation: int, loss: Callable | None) -> None:
        for _ in range(accumulation):
            self.engine.backward(self.loss(batch, loss))
            self.engine.step()

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()

    def forget(self) -> None:
        """The engine has forgotten its gradients."""

    def weights(self) -> int:
        parts = [p.ds_tensor for p in self.module.parameters() if hasattr(p, "ds_tensor")]
        return _bytes([*(parts or self.module.parameters()), *self.module.buffers()])

    def states(self) -> int:
        of_zero = self.optimizer
        inner = [value for state in of_zero.optimizer.state.values() for value in state.values()]
        if hasattr(of_zero, "grad_partitions_flat_buffer"):
            masters = [p for p in of_zero.fp32_partitioned_groups_flat if p.dtype != of_zero.lp_param_buffer.dtype]
            return _bytes([*inner, *masters, of_zero.grad_partitions_flat_buffer])
        return _bytes([*inner, *of_zero.single_partition_of_fp32_groups]) + self.gradients


RUNS: dict[str | None, type[Run]] = {
    None: Run,
    "ddp": DdpRun,
    "fsdp2": FsdpRun,
    "tp": TensorParallelRun,
    "zero1": ZeroRun,
    "zero2": ZeroRun,
    "zero3": ZeroRun,
}
