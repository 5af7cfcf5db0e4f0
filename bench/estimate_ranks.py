"""What s2ft.estimate predicts for one of several devices, against what real ranks use.

    python bench/estimate_ranks.py [--ranks 2 4] [--strategies ddp fsdp2 ...] [--models llama ...]

Each rank is a process of a gloo group on this machine. It measures its weights, its gradients and states after a step,
the bytes that autograd saves in a forward, and the largest sum of everything during the second step: by PyTorch's
profiler under DDP, and by the storages that are alive under the other strategies. ZeRO needs DeepSpeed.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the measurement is that of the tests

import torch
from harness import save
from support.rank_memory import measure
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
    "fsdp2-blocks": s2ft.Strategy("fsdp2", wrap="blocks"),
    "tp": s2ft.Strategy("tp"),
    "zero1": s2ft.Strategy("zero1", reduce_bucket_size=10_000_000),
    "zero2": s2ft.Strategy("zero2"),
    "zero3": s2ft.Strategy("zero3"),
    "zero3-small": s2ft.Strategy(
        "zero3", reduce_bucket_size=150_000, prefetch_bucket_size=500_000, max_reuse_distance=0, persistence_threshold=0
    ),
}
CONFIG = s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.1)
SHOWN = {"weights": "weights", "states": "gradients, states", "kept": "kept for backward", "peak": "peak of a step"}
ANSWER = "measured: "
IMPOSSIBLE = {("gpt2", "tp"), ("mixtral", "tp")}  # transformers has no plan, or one that also splits experts
RESULTS = Path(__file__).parent / "results" / "estimate_ranks.json"


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)


def estimated(name: str, strategy: s2ft.Strategy, ranks: int, args: argparse.Namespace) -> dict[str, int]:
    with torch.device("meta"):
        model = build(name)
    model.config.use_cache = False
    found = s2ft.estimate(model, CONFIG, args.batch, args.length, device="cpu", strategy=strategy, devices=ranks)
    return {
        "weights": found.parameters + found.buffers,
        "states": found.gradients + found.optimizer,
        "kept": found.kept,
        "peak": found.peak,
    }


# ---- measuring, in processes of their own ----------------------------------------------------------------


def measured(ranks: int, jobs: list[tuple[str, str]], args: argparse.Namespace) -> Iterator[list[dict[str, int]]]:
    """Yield the bytes of each rank for each model and strategy. One set of processes measures all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--measure", json.dumps(jobs)]
    command += ["--batch", str(args.batch), "--length", str(args.length)]
    started = []
    for rank in range(ranks):
        own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
        own |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1, DS_ACCELERATOR="cpu")
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
    for _ in jobs:
        yield [_answer(process) for process in started]
    for process in started:
        process.wait()


def _answer(process: subprocess.Popen) -> dict[str, int]:
    for line in process.stdout:
        if line.startswith(ANSWER):
            return json.loads(line.removeprefix(ANSWER))
    raise RuntimeError("a rank has ended with an error")


def measure_here(jobs: list[tuple[str, str]], batch: int, length: int) -> None:
    torch.distributed.init_process_group("gloo")

    def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        model.config.use_cache = False
        tokens = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "labels": tokens}

    for name, strategy in jobs:
        found = measure(partial(build, name), CONFIG, STRATEGIES[strategy], inputs)
        print(f"{ANSWER}{json.dumps(found)}", flush=True)
        gc.collect()


# ---- all together ----------------------------------------------------------------------------------------


def row(name: str, strategy: str, ranks: int, each: list[dict[str, int]], args: argparse.Namespace) -> dict[str, Any]:
    predicted = estimated(name, STRATEGIES[strategy], ranks, args)
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
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)  # set in the measuring processes
    args = parser.parse_args()
    if args.measure:
        measure_here(args.measure, args.batch, args.length)
        return
    # DeepSpeed changes functions of PyTorch under ZeRO-3, so that it comes last
    strategies = [name for name in STRATEGIES if name in args.strategies]
    jobs = [(name, strategy) for strategy in strategies for name in args.models if (name, strategy) not in IMPOSSIBLE]
    print(f"MiB estimated, measured (the rank with most), and their ratio; {args.batch} × {args.length} tokens a rank")
    print(f"{'model':<10}{'strategy':<14}{'ranks':>5}" + "".join(f"{title:>26}" for title in SHOWN.values()))
    results = {}
    for ranks in args.ranks:
        for (name, strategy), each in zip(jobs, measured(ranks, jobs, args)):
            results[f"{name}, {strategy}, {ranks} ranks"] = row(name, strategy, ranks, each, args)
    save(args.output, {"batch": args.batch, "length": args.length, "results": results})


if __name__ == "__main__":
    main()
