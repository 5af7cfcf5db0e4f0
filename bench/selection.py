"""Time and memory of every metric on SmolLM2-135M, against a forward and a backward of the model.

    python bench/selection.py [--sequences 64] [--length 128] [--batch 4] [--dtype float32]

Each run has a process of its own. Memory is the largest resident size of the process minus its size before the first
batch (Linux). "forward" is a forward of the frozen model without gradients, including its logits. "backward" is a
forward and a backward to the input embeddings of the frozen model. Gradient selection processes one sequence at a time,
so there is a backward of single sequences too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from experiments.memory import PeakMemory
from harness import in_process, save

import s2ft
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

RESULTS = Path(__file__).parent / "results" / "selection.json"
RATIOS = dict(v_ratio=0.34, o_ratio=0.12, u_ratio=0.03, g_ratio=0.03, d_ratio=0.03)
# name → (the run it is compared with, sequences in a batch; None means --batch)
RUNS = {
    "forward": (None, None),
    "backward": (None, None),
    "backward of single sequences": (None, 1),
    "weight": (None, None),
    "activation": ("forward", None),
    "product": ("forward", None),
    "gradient": ("backward", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)  # set in the process of a run
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    results = {}
    for name, (beside, _) in RUNS.items():
        results[name] = in_process(__file__, *sys.argv[1:], "--only", name)
        print(
            f"{name:<30}{results[name]['seconds']:>8.1f} s{results[name]['growth MiB']:>8.0f} MiB"
            + (f"{results[name]['growth MiB'] / results[beside]['growth MiB']:>8.2f} of {beside}" if beside else ""),
            flush=True,
        )
    save(
        RESULTS,
        {
            **{key: getattr(args, key) for key in ("sequences", "length", "batch", "dtype")},
            "ratios": RATIOS,
            "runs": results,
        },
    )


def measure(name: str, args: argparse.Namespace) -> dict:
    model, _ = load_model(default_model(), args.dtype)
    ids = torch.randint(
        model.config.vocab_size, (args.sequences, args.length), generator=torch.Generator().manual_seed(0)
    )
    batches = list(ids.split(RUNS[name][1] or args.batch))
    plain = {"forward": forward, "backward": backward, "backward of single sequences": backward}
    memory, start = PeakMemory("cpu"), time.perf_counter()
    memory.forget_peak()  # it was reached while loading
    if name in plain:
        model.requires_grad_(False)
        for batch in batches:
            plain[name](model, batch)
    else:
        s2ft.select(model, s2ft.S2FTConfig(**RATIOS, selection=name), None if name == "weight" else batches)
    return {"seconds": time.perf_counter() - start, "growth MiB": memory.peak() / 2**20}


def forward(model, batch: torch.Tensor) -> None:
    with torch.no_grad():
        model(batch, use_cache=False)


def backward(model, batch: torch.Tensor) -> None:
    embedded = model.get_input_embeddings()(batch).requires_grad_(True)
    model(inputs_embeds=embedded, labels=batch, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
