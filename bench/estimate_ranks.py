"""What s2ft.estimate predicts for one of several devices, against what real ranks use.

    python bench/estimate_ranks.py [--ranks 2 4] [--strategies ddp fsdp2 ...] [--models llama ...]

Each rank is a process of a gloo group on this machine. It measures its weights, its gradients and states after a step,
the bytes that autograd saves in a forward, and the largest sum of everything during the second step: by PyTorch's
profiler under DDP, and by the storages that are alive under the other strategies. ZeRO needs DeepSpeed. The tests
compare the estimate with the committed measurements.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the processes are those of the tests
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, in each process

import torch
import torch.distributed as dist
from harness import save
from support.ranks import Ranks
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

import s2ft

SHAPE = dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8, vocab_size=8000)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {  # random weights, near 20M parameters
    "llama": lambda: LlamaConfig(**SHAPE, **IDS, num_key_value_heads=4),
    "qwen2": lambda: Qwen2Config(**SHAPE, **IDS, num_key_value_heads=4, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SHAPE, **IDS, num_key_value_heads=4, head_dim=48, sliding_window=64),
    "gpt2": lambda: GPT2Config(n_embd=384, n_layer=6, n_head=8, vocab_size=8000, bos_token_id=1, eos_token_id=2),
    "mixtral": lambda: MixtralConfig(**{**SHAPE, "intermediate_size": 512}, **IDS, num_local_experts=4),
}
STRATEGIES = {
    "ddp": s2ft.Strategy("ddp"),
    "fsdp2": s2ft.Strategy("fsdp2"),
    "fsdp2-kept": s2ft.Strategy("fsdp2", reshard_after_forward=False),
    "tp": s2ft.Strategy("tp"),
    "zero1": s2ft.Strategy("zero1", reduce_bucket_size=10_000_000),
    "zero2": s2ft.Strategy("zero2"),
    "zero3": s2ft.Strategy("zero3"),
    "zero3-small": s2ft.Strategy("zero3", reduce_bucket_size=150_000),
}
SMALL = {"prefetch_bucket_size": 500_000, "max_reuse_distance": 0, "param_persistence_threshold": 0}  # of zero3-small
CONFIG = s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.1)
SHOWN = {"weights": "weights", "states": "gradients, states", "kept": "kept for backward", "peak": "peak of a step"}
IMPOSSIBLE = {("gpt2", "tp")}  # transformers has no plan
RESULTS = Path(__file__).parent / "results" / "estimate_ranks.json"
BEGIN, END = "s2ft: measured step begins", "s2ft: measured step ends"


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    model.config.use_cache = False
    return model


def estimated(name: str, strategy: s2ft.Strategy, ranks: int, batch: int, length: int) -> dict[str, int]:
    with torch.device("meta"):
        model = build(name)
    found = s2ft.estimate(model, CONFIG, batch, length, device="cpu", strategy=strategy, devices=ranks)
    weights, states = found.parameters + found.buffers, found.gradients + found.optimizer
    return {"weights": weights, "states": states, "kept": found.kept, "peak": found.peak}


# ---- measuring, in processes of their own ----------------------------------------------------------------


def measure(rank: int, name: str, strategy: str, batch: int, length: int) -> dict[str, int]:
    """Train two steps and return the bytes of the second."""
    gc.collect()
    kind, tokens = RUNS[strategy.partition("-")[0]], torch.Generator().manual_seed(0)
    model = kind.loaded(name)
    with kind.meter() as meter:
        model = model or build(name)
        s2ft.attach(model, CONFIG)
        ids = torch.randint(model.config.vocab_size, (batch, length), generator=tokens)
        run = kind(model.train(), strategy)
        run.step(ids)
        states = run.states()
        run.forget()
        between = run.weights() + run.states() if isinstance(meter, Growth) else 0
        meter.begin()
        run.step(ids)
        meter.end()
    result = {"weights": run.weights(), "states": states, "peak": between + meter.peak()}
    run.forget()
    return {**result, "kept": _kept(run, ids)}


class Allocations:
    """The largest number of bytes that were allocated at one time in this thread, from PyTorch's profiler.

    It also reports what a reducer allocates.
    """

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

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.most = self.found = 0

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

    def begin(self) -> None:
        self.before = self.total()
        super().begin()

    def peak(self) -> int:
        return self.found - self.before


def _kept(run: "RankRun", ids: Tensor) -> int:
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
        loss = run.loss(ids)  # stays alive while bytes are counted
    total = sum(kept.values())
    run.backward(loss)
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensors) -> int:
    """Return the bytes of the tensors' local storages. A storage is counted once."""
    found = [_local(t.detach()).untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}.values())


class RankRun:
    """Training on the ranks of the default process group."""

    meter: type = Growth

    @staticmethod
    def loaded(name: str) -> nn.Module | None:
        """Return a model that must be loaded from files."""
        return None

    def __init__(self, model: nn.Module, strategy: str) -> None:
        self.module, self.strategy = model, strategy
        self.model = self.wrapped(model)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def wrapped(self, model: nn.Module) -> nn.Module:
        return model

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def step(self, ids: Tensor) -> None:
        self.loss(ids).backward()
        self.optimizer.step()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def forget(self) -> None:
        self.optimizer.zero_grad()

    def weights(self) -> int:
        return _bytes([*self.module.parameters(), *self.module.buffers()])

    def states(self) -> int:
        gradients = sum(_local(p.grad).nbytes for p in self.trained if p.grad is not None)
        return gradients + _bytes(value for state in self.optimizer.state.values() for value in state.values())


class DdpRun(RankRun):
    meter = Allocations

    def wrapped(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model)


class FsdpRun(RankRun):
    def wrapped(self, model: nn.Module) -> nn.Module:
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
            reshard_after_forward=STRATEGIES[self.strategy].reshard_after_forward,
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])  # accelerate takes both
        return Accelerator(cpu=True, fsdp_plugin=plugin).prepare(model, optimizer)[0]

    def weights(self) -> int:
        for module in self.module.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        return super().weights()


class TensorParallelRun(RankRun):
    @staticmethod
    def loaded(name: str) -> nn.Module:
        from transformers.distributed import DistributedConfig

        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder)
        if dist.get_rank() == 0:
            build(name).save_pretrained(folder[0])
        dist.barrier()
        size = DistributedConfig(tp_size=dist.get_world_size())
        model = AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=size)
        model.config.use_cache = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
        return model

    def weights(self) -> int:
        """Parts that are read from a file are views of the whole file."""
        parts = [_local(tensor.detach()) for tensor in [*self.module.parameters(), *self.module.buffers()]]
        return sum({part.data_ptr(): part.nbytes for part in parts}.values())


class ZeroRun(RankRun):
    """DeepSpeed's engine. Its optimizer updates a flat partition, and it has the gradients until the step."""

    meter = Storages

    def __init__(self, model: nn.Module, strategy: str) -> None:
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        small = {f"stage3_{name}": value for name, value in SMALL.items()} if strategy.endswith("small") else {}
        bucket = STRATEGIES[strategy].reduce_bucket_size
        zero = {"stage": int(strategy[4]), "reduce_bucket_size": bucket, "overlap_comm": False, **small}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "zero_optimization": zero}
        self.module = model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.engine = self.model = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.optimizer, self.gradients = self.engine.optimizer, 0
        if not self.engine.optimizer.__class__.__name__.endswith("Stage3"):
            step = self.optimizer.step
            self.optimizer.step = lambda *args, **named: (self._note_gradients(), step(*args, **named))[1]

    def _note_gradients(self) -> None:
        self.gradients = _bytes(g for group in self.optimizer.averaged_gradients.values() for g in group)

    def step(self, ids: Tensor) -> None:
        self.backward(self.loss(ids))

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


RUNS: dict[str, type[RankRun]] = {"ddp": DdpRun, "fsdp2": FsdpRun, "tp": TensorParallelRun}
RUNS |= dict.fromkeys(("zero1", "zero2", "zero3"), ZeroRun)


# ---- all together ----------------------------------------------------------------------------------------


def row(name: str, strategy: str, ranks: int, each: list[dict[str, int]], args: argparse.Namespace) -> dict[str, Any]:
    predicted = estimated(name, STRATEGIES[strategy], ranks, args.batch, args.length)
    found = {what: max(rank[what] for rank in each) for what in SHOWN}
    ratios = {what: predicted[what] / found[what] for what in SHOWN}
    cells = (f"{predicted[what] / 2**20:>9.2f}{found[what] / 2**20:>9.2f}{ratios[what]:>8.4f}" for what in SHOWN)
    print(f"{name:<10}{strategy:<14}{ranks:>5}" + "".join(cells), flush=True)
    return {"estimated": predicted, "measured": each, "estimated to the largest measured": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    # DeepSpeed changes functions of PyTorch under ZeRO-3, so that it comes last
    strategies = [name for name in STRATEGIES if name in args.strategies]
    jobs = [(name, strategy) for strategy in strategies for name in args.models if (name, strategy) not in IMPOSSIBLE]
    print(f"MiB estimated, measured (the rank with most), and their ratio; {args.batch} × {args.length} tokens a rank")
    print(f"{'model':<10}{'strategy':<14}{'ranks':>5}" + "".join(f"{title:>26}" for title in SHOWN.values()))
    results = {}
    for ranks in args.ranks:
        processes = Ranks(ranks)
        for name, strategy in jobs:
            each = processes(measure, name, strategy, args.batch, args.length)
            results[f"{name}, {strategy}, {ranks} ranks"] = row(name, strategy, ranks, each, args)
        processes.close()
    save(RESULTS, {"batch": args.batch, "length": args.length, "results": results})


if __name__ == "__main__":
    main()
