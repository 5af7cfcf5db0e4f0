"""Host memory of each rank that attaches to a model which only the first rank reads, and trains it with FSDP2.

    python bench/ranks_memory.py [--ranks 2 4] [--layers 19] [--layout permuted indexed] [--steps 2]

accelerate shards a model of about 1 GB (float32) with cpu_ram_efficient_loading. Each rank is a process of a gloo group
on this machine. It first does everything with a tiny model, so that all is imported and connected. Then it loads,
attaches, prepares and trains the model. Memory is the peak of the process's resident memory beyond what it had before
the model: "prepared" until the model is sharded, "trained" during the updates. "plain" is the same without s2ft, with
every parameter frozen but one. A rank that is not the first needs its shard, the slices in full, and one complete
parameter: accelerate broadcasts one after the other and keeps the last one until all are loaded.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # accelerate uses FSDP on CPUs only with its help

from harness import save

RESULTS = Path(__file__).parent / "results" / "ranks_memory.json"
MB = 1e6
WAYS = ("permuted", "indexed", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layout", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--selection", default="random")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the models are written, and kept; default: a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args)))
        return
    results = []
    with tempfile.TemporaryDirectory() if args.folder is None else nullcontext(args.folder) as folder:
        for name, layers, width in (("tiny", 1, 64), ("model", args.layers, args.width)):
            if not Path(folder, name).exists():
                make(Path(folder, name), layers, width, args.vocabulary)
        for ranks in args.ranks:
            for layout in args.layout:
                found = run(Path(folder), ranks, layout, args)
                results.append({"ranks": ranks, "layout": layout, "by rank": found})
                show(ranks, layout, found)
    save(args.output, {"arguments": {k: str(v) for k, v in vars(args).items() if k != "output"}, "results": results})


def show(ranks: int, layout: str, found: list[dict[str, float]]) -> None:
    print(f"{ranks} ranks, {layout}")
    for rank, one in enumerate(found):
        shard = one["shard"]
        print(
            f"  rank {rank}: shard {shard / MB:6.0f} MB, prepared {one['prepared'] / MB:6.0f} MB "
            f"({one['prepared'] / shard:.2f} shards), trained {one['trained'] / MB:6.0f} MB "
            f"({one['trained'] / shard:.2f} shards); largest tensor {one['largest'] / MB:.0f} MB"
        )


def make(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=vocabulary,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")


def run(folder: Path, ranks: int, layout: str, args: argparse.Namespace) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--measure", str(folder), "--layout", layout]
    command += ["--steps", str(args.steps), "--selection", args.selection]
    started = []
    for rank in range(ranks):
        own: dict[str, Any] = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
        own |= dict(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1, MALLOC_MMAP_THRESHOLD_=65536
        )  # freed is given back
        own |= dict(ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION=2)
        own |= dict(FSDP_CPU_RAM_EFFICIENT_LOADING="true", HF_HUB_OFFLINE=1)
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment))
    outputs = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, outputs):
        if process.returncode:
            raise SystemExit(errors.decode()[-4000:])
    return [json.loads(output.decode().splitlines()[-1]) for output, _ in outputs]


# ---- measuring, in processes of their own ----------------------------------------------------------------


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    import torch.distributed as dist
    from support.fsdp_on_cpu import allow

    dist.init_process_group("gloo")
    allow()
    train_once(folder / "tiny", args, Peak())
    gc.collect()
    peak = Peak()
    result = train_once(folder / "model", args, peak)
    dist.barrier()
    dist.destroy_process_group()
    return result


class Peak:
    """The peak of the process's resident memory beyond what it had when this object was made."""

    def __init__(self) -> None:
        self.before = resident("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Let the peak begin with the present memory."""
        Path("/proc/self/clear_refs").write_text("5")

    def __call__(self) -> float:
        return resident("VmHWM") - self.before


def resident(field: str) -> float:
    """A value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise KeyError(field)


def train_once(folder: Path, args: argparse.Namespace, peak: Peak) -> dict[str, float]:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import LlamaForCausalLM

    import s2ft

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layout = args.layout[0]
    if layout == "plain":
        model.requires_grad_(False)
        model.model.norm.weight.requires_grad_(True)
    else:
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.1, layout=layout, selection=args.selection))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    prepared = peak()
    peak.restart()
    shard = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    model.train()
    batch = torch.randint(model.config.vocab_size, (1, 32))
    for _ in range(args.steps):
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "prepared": prepared,
        "trained": peak(),
        "shard": shard,
        "largest": max(p.numel() * p.element_size() for p in model.parameters()),
    }


if __name__ == "__main__":
    main()
