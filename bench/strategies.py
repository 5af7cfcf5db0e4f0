"""The same fine-tuning by every strategy for several devices, compared with one process.

    python bench/strategies.py [--ranks 2 4] [--strategies ddp fsdp ...] [--layouts permuted indexed]
        [--selection weight] [--model FOLDER]

Each rank is a process of a gloo group on this machine. For each strategy, layout and number of ranks the script prints
whether the same units were selected, the largest difference of a loss and of the saved adapter from those of one
process, relative to the largest value, and whether the adapter's files have the same form. It ends with status 1 if one
of them is not as it must be. ZeRO needs DeepSpeed.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parents[1] / "tests" / "distributed")]
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, in each process

import torch
import torch.distributed as dist
from harness import save
from runs import files, sharded
from support.ranks import Ranks
from support.tolerances import relative_difference
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import s2ft

STEPS, ROWS, LENGTH, RATE, CLIP = 4, 4, 16, 1e-2, 0.5
RATIOS = dict(q_ratio=0.25, v_ratio=0.25, o_ratio=0.25, u_ratio=0.1, d_ratio=0.1)
LOSS, ADAPTER = 1e-5, 1e-3  # largest relative differences; a change of 1e-7 in a small gradient is larger after AdamW
RESULTS = Path(__file__).parent / "results" / "strategies.json"
Update = Callable[[torch.Tensor], None]


@dataclass
class PreparedStrategy:
    """A model that is ready to train.

    Attributes:
        model: The attached model.
        forward: What computes the loss: the model or a wrapper of it.
        update: Does the backward pass of a loss, clips the gradients and changes the parameters.
        groups: Number of groups of ranks that train on different rows.
    """

    model: nn.Module
    forward: nn.Module
    update: Update
    groups: int


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)


def attach(model: nn.Module, settings: dict[str, Any]) -> nn.Module:
    config = s2ft.S2FTConfig(**RATIOS, **settings)
    needs_rows = config.selection in ("activation", "product", "gradient")
    s2ft.attach(model, config, calibration=[rows[:2] for rows in batches(model)] if needs_rows else None)
    return model


def batches(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(model.config.vocab_size, (ROWS, LENGTH), generator=generator) for _ in range(STEPS)]


def by_torch(model: nn.Module, forward: nn.Module, groups: int) -> PreparedStrategy:
    """Train by a plain loop of PyTorch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return PreparedStrategy(model, forward, update, groups)


# ---- strategies ----------------------------------------------------------------------------------------


def one(folder: Path, settings: dict, count: int) -> PreparedStrategy:
    model = attach(load(folder), settings)
    return by_torch(model, model, count)


def ddp(folder: Path, settings: dict, count: int) -> PreparedStrategy:
    model = attach(load(folder), settings)
    return by_torch(model, nn.parallel.DistributedDataParallel(model), count)


def fsdp(folder: Path, settings: dict, count: int) -> PreparedStrategy:
    model = sharded(attach(load(folder), settings))
    return by_torch(model, model, count)


def fsdp_first(folder: Path, settings: dict, count: int) -> PreparedStrategy:
    model = attach(sharded(load(folder)), settings)
    return by_torch(model, model, count)


def fsdp_meta(folder: Path, settings: dict, count: int) -> PreparedStrategy:
    """As accelerate does it with cpu_ram_efficient_loading: the first rank reads, the others have the meta device."""
    from support.fsdp_on_cpu import allow

    allow()
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    model = load(folder, **({"device_map": "meta"} if dist.get_rank() else {}))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        cpu_ram_efficient_loading=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    attach(model, settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1))

    def update(loss: torch.Tensor) -> None:
        accelerator.backward(loss)
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return PreparedStrategy(model, model, update, count)


def zero(stage: int, partitioned: bool = False) -> Callable[[Path, dict, int], PreparedStrategy]:
    def prepare(folder: Path, settings: dict, count: int) -> PreparedStrategy:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        config = {
            "train_micro_batch_size_per_gpu": ROWS // count,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        kept = HfDeepSpeedConfig(config) if partitioned else None  # from_pretrained partitions while it is alive
        model = load(folder)
        assert partitioned == hasattr(next(model.parameters()), "ds_id")
        attach(model, settings)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.1)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        del kept

        def update(loss: torch.Tensor) -> None:
            engine.backward(loss)
            engine.step()

        return PreparedStrategy(engine.module, engine, update, count)

    return prepare


def tensor(shards: int = 1) -> Callable[[Path, dict, int], PreparedStrategy]:
    """Tensor parallelism of transformers, with FSDP2 over `shards` groups of ranks."""

    def prepare(folder: Path, settings: dict, count: int) -> PreparedStrategy:
        from transformers.distributed import DistributedConfig

        sizes = {"fsdp_size": shards} if shards > 1 else {}
        model = load(folder, distributed_config=DistributedConfig(tp_size=count // shards, **sizes))
        attach(model, settings)
        return by_torch(model, model, shards)

    return prepare


STRATEGIES: dict[str, Callable[[Path, dict, int], PreparedStrategy]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp-meta": fsdp_meta,
    "fsdp-first": fsdp_first,
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3-init": zero(3, partitioned=True),
    "tensor": tensor(),
    "tensor-fsdp": tensor(2),
}
SHOWN = {
    "ddp": "DDP",
    "fsdp": "FSDP2 after attach",
    "fsdp-meta": "FSDP2, first rank reads",
    "fsdp-first": "FSDP2 before attach",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3-init": "ZeRO-3, zero.Init",
    "tensor": "tensor parallel",
    "tensor-fsdp": "tensor × FSDP2",
}


# ---- running and comparing -------------------------------------------------------------------------------


def train(rank: int, count: int, strategy: str, folder: Path, settings: dict, output: Path) -> list[float]:
    """Train on this rank and save the adapter. Returns the losses of its rows."""
    prepared = (STRATEGIES[strategy] if strategy else one)(folder, settings, count)
    group = rank * prepared.groups // count  # neighbouring ranks share rows
    rows = slice(group * ROWS // prepared.groups, (group + 1) * ROWS // prepared.groups)
    losses = []
    prepared.forward.train()
    for batch in batches(prepared.model):
        loss = prepared.forward(input_ids=batch[rows], labels=batch[rows]).loss
        losses.append(loss.item())
        prepared.update(loss)
    s2ft.save_adapter(prepared.model, output)
    return losses


def run(count: int, strategy: str, folder: Path, settings: dict, output: Path) -> list[float]:
    """Train on new processes, which no earlier strategy has changed. Returns the loss of each step over all rows."""
    ranks = Ranks(count)
    try:
        losses = ranks(train, count, strategy, folder, settings, output)
    finally:
        ranks.close()
    return [sum(step) / count for step in zip(*losses)]


def compare(losses: list[float], output: Path, expected_losses: list[float], expected: Path) -> dict[str, Any]:
    (tensors, config), (expected_tensors, expected_config) = files(output), files(expected)
    forms = [{key: (value.dtype, value.shape) for key, value in found.items()} for found in (tensors, expected_tensors)]
    deltas = [key for key in expected_tensors if key.endswith(".delta")]
    same_form = config == expected_config and forms[0] == forms[1]
    return {
        "selection": config["selection_digest"] == expected_config["selection_digest"]
        and config["projections"] == expected_config["projections"],
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, expected_losses)),
        "adapter": max(relative_difference(tensors[key], expected_tensors[key]) for key in deltas)
        if same_form
        else float("nan"),
        "form": same_form,
    }


def is_equal(row: dict[str, Any]) -> bool:
    return row["selection"] and row["form"] and row["loss"] <= LOSS and row["adapter"] <= ADAPTER


def default_model(folder: Path) -> Path:
    """A Llama with random weights whose heads and channels can be divided over four ranks."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, vocab_size=97)
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def skipped(strategy: str, count: int) -> str:
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    return "needs at least four ranks" if strategy == "tensor-fsdp" and count < 4 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--layouts", nargs="+", default=["permuted", "indexed"])
    parser.add_argument("--selection", default="weight")
    parser.add_argument("--model", type=Path, help="folder of a causal language model in float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = table(args, Path(work))
    save(RESULTS, {"rows": rows})
    return 0 if all(row.get("equal", True) for row in rows) else 1


def table(args: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    folder, rows = args.model or default_model(work / "model"), []
    print(f"{'strategy':25} {'layout':9} ranks  units  loss differs  adapter differs  files", flush=True)
    for layout in args.layouts:
        settings = {"layout": layout, "selection": args.selection}
        expected = run(1, "", folder, settings, work / f"one-{layout}")
        for strategy in args.strategies:
            for count in args.ranks:
                row = {"strategy": strategy, "layout": layout, "ranks": count}
                shown = f"{SHOWN[strategy]:25} {layout:9} {count:5}"
                rows.append(row)
                row["skipped"] = skipped(strategy, count)
                if row["skipped"]:
                    print(f"{shown}  - {row['skipped']}", flush=True)
                    continue
                output = work / f"{strategy}-{layout}-{count}"
                try:
                    losses = run(count, strategy, folder, settings, output)
                except AssertionError as error:  # with the tracebacks of the ranks
                    row |= {"error": str(error).strip().splitlines()[-1], "equal": False}
                    print(f"{shown}  FAILED: {row['error']}", flush=True)
                    continue
                row |= compare(losses, output, expected, work / f"one-{layout}")
                row["equal"] = is_equal(row)
                print(
                    f"{shown}  {'same' if row['selection'] else 'OTHER':5}  {row['loss']:12.1e}  {row['adapter']:15.1e}"
                    f"  {'same' if row['form'] else 'OTHER'}{'' if row['equal'] else '  NOT EQUAL'}",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    sys.exit(main())
