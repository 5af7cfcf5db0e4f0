"""Speed and memory of `s2ft sft` against PEFT's LoRA in TRL's SFTTrainer.

    python bench/finetune.py [--dtype float32|bfloat16|both] [--rounds 3] [--steps 12]
        [--model FOLDER_OR_GGUF | --shape llama-3.2-1b]

Every run has a process of its own, so that its peak does not depend on other runs. The methods take turns. All train on
the same rows in the same order with the same arguments. A step is one batch of --batch rows of the demo's word
problems.

    S²FT            s2ft sft --d-ratio 0.03
    LoRA, our loss  PEFT r=16 on q, k, v, up, down in the same trainer, with the batches and the loss of s2ft
    LoRA            the same in TRL's SFTTrainer as it is: rows padded on the right, and TRL's loss
    …, base's dtype LoRA with adapters in bfloat16 on a bfloat16 base, where PEFT itself makes them float32

Tokens per second are the median over the steps after the second one, without padding. Memory is the peak of the process
during training minus its memory when the model was loaded. On a GPU it is device memory.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from s2ft.packages import check_packages

check_packages("s2ft finetune")  # before the imports below, which need them

from experiments.memory import PeakMemory
from harness import in_process, save
from shapes import add_model_options, base_name, base_of
from train_step import LORA_TARGETS, lora_model

import s2ft
from s2ft.text.generation import contiguous_head
from s2ft.text.prompts import pad_id
from s2ft.train.arguments import SFTArguments
from s2ft.train.batching import choose_batching
from s2ft.train.demo import problem_set, token_rows
from s2ft.train.device import keep_freed_memory
from s2ft.train.fit import JsonlLog, checkpointing, loss_for, sft
from s2ft.train.loss import why_not_chunked
from s2ft.train.options import RunOptions
from s2ft.train.output import RunFolder, read_log
from s2ft.train.trainers import SFTTrainer, TokenRowTrainer

RESULTS = Path(__file__).parent / "results" / "finetune.json"
OWN = ", base's dtype"
METHODS = ("S²FT", "LoRA, our loss", "LoRA", "LoRA, our loss" + OWN, "LoRA" + OWN)


def methods_for(dtype: str) -> tuple[str, ...]:
    """On a float32 base PEFT's adapters are in the base's dtype in any case."""
    return METHODS if dtype == "bfloat16" else METHODS[:3]


def train(method: str, model, tokenizer, rows, arguments: SFTArguments, folder: RunFolder) -> None:
    if method == "S²FT":
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.03))
        sft(model, tokenizer, rows, arguments, folder)
        return
    base, callbacks, float32 = model, [JsonlLog(folder.log)], not method.endswith(OWN)
    if method.removesuffix(OWN) == "LoRA":
        model = lora_model(base, 16, LORA_TARGETS, copied=False, float32=float32)
        arguments.assistant_only_loss = False  # the rows have labels
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        SFTTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
        ).train()
        return
    batching = choose_batching(base, pad_id(tokenizer), rows, arguments)
    example = batching.collator([rows[0]])
    assert not why_not_chunked(base, example)
    with contiguous_head(base), loss_for(base, arguments, RunOptions(), example), checkpointing(base, arguments):
        model = lora_model(base, 16, LORA_TARGETS, copied=False, float32=float32)
        TokenRowTrainer(
            model, arguments, batching.prepare(rows, arguments), batching, tokenizer=tokenizer, callbacks=callbacks
        ).train()


def child(args: argparse.Namespace) -> None:
    """Run one method once and print the result as a line of JSON."""
    if args.keep_memory and not keep_freed_memory():
        raise SystemExit("--keep-memory needs glibc")
    model, tokenizer = base_of(args, args.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    model.train()
    rows = token_rows(tokenizer, problem_set(args.steps * args.batch, held_out=False))
    with tempfile.TemporaryDirectory() as path:
        arguments = SFTArguments(
            output_dir=path,
            learning_rate=2e-4,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            warmup_steps=0,  # TRL alone would give the first step of a warm-up a learning rate of 0
            save_steps=0,
            gradient_checkpointing=args.checkpointing,
            train_sampling_strategy="sequential",
        )
        memory, folder = PeakMemory(model.device.type), RunFolder(path)
        memory.forget_peak()
        train(args.child, model, tokenizer, rows, arguments, folder)
        lines = read_log(folder.log)
    found = {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[2:]),
        "peak_bytes": memory.peak(),
        "loss": [line["loss"] for line in lines],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    print(json.dumps(found))


def run(method: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    return in_process(
        __file__,
        f"--child={method}",
        f"--dtype={dtype}",
        f"--steps={args.steps}",
        f"--batch={args.batch}",
        *([f"--model={args.model}"] if args.model else []),
        *([f"--shape={args.shape}"] if args.shape else []),
        *(["--checkpointing"] if args.checkpointing else []),
        *(["--keep-memory"] if args.keep_memory else []),
    )


def table(title: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print and return the medians, and the medians of S²FT's ratios of each round."""
    print(f"{title}\n{'':<28}{'tokens/s':>9}{'S²FT is':>9}{'peak MiB':>10}{'S²FT has':>10}{'last loss':>11}")
    rows = {}
    for method, results in runs.items():
        faster = statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(runs["S²FT"], results)
        )
        memory = statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in zip(runs["S²FT"], results))
        rows[method] = {
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in results),
            "s2ft_speed": faster,
            "peak_MiB": statistics.median(r["peak_bytes"] for r in results) / 2**20,
            "s2ft_memory": memory,
            "last_loss": results[0]["loss"][-1],
            "trained": results[0]["trained"],
            "runs": results,
        }
        row = rows[method]
        print(
            f"{method:<28}{row['tokens_per_second']:>9.0f}{faster:>8.2f}×{row['peak_MiB']:>10.0f}{memory:>9.2f}×"
            f"{row['last_loss']:>11.3f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_options(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="use gradient checkpointing for all methods")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory of the CPU for the next tensor")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    results = {}
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        methods = methods_for(dtype)
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for number in range(args.rounds):
            first = number % len(methods)
            for method in methods[first:] + methods[:first]:
                runs[method].append(run(method, dtype, args))
        results[dtype] = table(f"{dtype}, batches of {args.batch}, {args.rounds} rounds of {args.steps} steps", runs)
    options = {"batch": args.batch, "steps": args.steps, "checkpointing": args.checkpointing}
    options["keep_memory"] = args.keep_memory
    save(RESULTS, {"base": base_name(args), **options, "results": results})


if __name__ == "__main__":
    main()
