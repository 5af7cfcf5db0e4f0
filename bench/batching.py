"""Speed of `s2ft sft` on rows of mixed length, by the way in which rows become batches.

    python bench/batching.py [--dtype float32|bfloat16] [--rounds 3] [--rows 128] [--model FOLDER_OR_GGUF | --smoke]

    random     rows in random order, padded to the longest of a batch
    by length  rows of similar length in a batch, padded; the default without attention over sequences of any length
    packed     packed by TRL into sequences of the longest row (packing: true)
    one row    the rows of a batch in one sequence, without padding (padding_free: true); default with flash attention

The lengths are spread evenly on a logarithmic scale, as those of chats are, from 16 to --longest tokens. The last third
of a row has labels. All ways train on the same rows, an epoch each. The ways take turns. Tokens are counted without
padding. Seconds of the processor are counted too, since they depend less on what else a machine does; they mean nothing
on a GPU. --smoke uses a small random model.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness import save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import s2ft
from s2ft.text.models import load_model
from s2ft.train.arguments import SFTArguments
from s2ft.train.demo import default_model
from s2ft.train.output import RunFolder
from s2ft.train.sft import sft

RESULTS = Path(__file__).parent / "results" / "batching.json"
WAYS = {
    "random": {"train_sampling_strategy": "random"},
    "by length": {},
    "packed": {"packing": True},
    "one row": {"padding_free": True},
}


def mixed_rows(count: int, longest: int, vocabulary: int) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(count, generator=generator).tolist()
    rows = []
    for share in shares:
        length = round(math.exp(math.log(16) + share * (math.log(longest) - math.log(16))))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        unlabelled = length - length // 3
        rows.append({"input_ids": ids, "labels": [-100] * unlabelled + ids[unlabelled:]})
    return Dataset.from_list(rows)


def small_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model, and a tokenizer of which only the end token is used."""
    from tokenizers import Tokenizer, models

    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4
    )
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0}, merges=[]))
    torch.manual_seed(0)
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def speed(way: str, model, tokenizer, rows: Dataset, args: argparse.Namespace) -> dict[str, float]:
    """Train one epoch and return tokens per second, of the clock and of the processor."""
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.03))
    with tempfile.TemporaryDirectory() as path:
        arguments = SFTArguments(
            output_dir=path,
            num_train_epochs=1,
            per_device_train_batch_size=args.batch,
            max_length=args.longest,
            learning_rate=1e-6,
            save_steps=0,
            **WAYS[way],
        )
        start = time.process_time()
        result = sft(model, tokenizer, rows, arguments, RunFolder(path))
        busy = time.process_time() - start
    s2ft.detach(model)  # puts the weights back
    tokens = result.tokens_per_second * result.seconds
    return {"tokens_per_second": result.tokens_per_second, "tokens_per_processor_second": tokens / busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=None, help="folder or GGUF file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--smoke", action="store_true", help="use a small random model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    model, tokenizer = small_model() if args.smoke else load_model(args.model or default_model(), args.dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    rows = mixed_rows(args.rows, args.longest, model.config.vocab_size)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in [*list(WAYS)[number % 4 :], *list(WAYS)[: number % 4]]:
            runs[way].append(speed(way, model, tokenizer, rows, args))
    print(f"{'':<12}{'tokens/s':>10}{'to random':>11}{'a processor second':>20}{'to random':>11}")
    results = {}
    for way, found in runs.items():
        row: dict[str, Any] = {"runs": found}
        for name in found[0]:
            row[name] = statistics.median(run[name] for run in found)
            row[f"{name}_to_random"] = statistics.median(a[name] / b[name] for a, b in zip(found, runs["random"]))
        results[way] = row
        wall, busy = (f"tokens_per_{name}" for name in ("second", "processor_second"))
        print(
            f"{way:<12}{row[wall]:>10.0f}{row[wall + '_to_random']:>10.2f}×"
            f"{row[busy]:>20.0f}{row[busy + '_to_random']:>10.2f}×"
        )
    if not args.smoke:
        kept = {key: getattr(args, key) for key in ("dtype", "batch", "rows", "longest")}
        save(args.output, {**kept, "attention": model.config._attn_implementation, "results": results})


if __name__ == "__main__":
    main()
