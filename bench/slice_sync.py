"""Slices of a training run sent to vLLM after each update: are its tensors the merged ones, and what it costs.

    python bench/slice_sync.py [--steps 50] [--dtype float32] [--form permuted] [--tiny] [--model FOLDER_OR_GGUF]

The model trains on random tokens. After each update the slices are sent to vLLM's LLM in this process, and all of its
tensors are compared, bit for bit, with those that its own loader makes of the merged checkpoint. At the end the base is
restored and compared. Bytes are those of the numbers; a server gets them as base64, which is a third more. It
needs vLLM (`make test-vllm` makes an environment that has it).
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from harness import save
from shapes import write_base
from support.vllm_rl import engine, has_merged, merged_model, model_in, save_base
from support.vllm_transfer import parameters, same

from s2ft.sync import SliceSender

RESULTS = Path(__file__).parent / "results"
RATIOS = dict(d_ratio=0.03, o_ratio=0.12)


def base_folder(folder: str, options: argparse.Namespace) -> str:
    """A folder of the base that both libraries can load."""
    if options.tiny:
        return str(save_base(folder, options.dtype))
    return write_base(folder, options.dtype, options.model)


def measure(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train, send and compare."""
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = model_in(options.form, folder, dtype, **RATIOS)
    trained = [one for one in model.parameters() if one.requires_grad]
    whole = sum(one.numel() * dtype.itemsize for one in merged_model(model).parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    llm = engine(folder, options.dtype, skip_tokenizer_init=True)
    first, seconds, equal, moved = parameters(llm), [], 0, 0
    data = torch.randint(3, model.config.vocab_size, (2, 16))
    with SliceSender(model, llm) as sender:
        for _ in range(options.steps):
            sent = sender.sync()
            seconds.append(sent.seconds)
            moved += not same(first, parameters(llm))
            equal += has_merged(llm, model)
            model(input_ids=data, labels=data).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    slices = sum(one.numel() for one in trained) * dtype.itemsize
    return {
        "syncs": options.steps,
        "syncs after which all tensors equal the merged ones": equal,
        "syncs after which tensors differ from the base": moved,
        "base restored": same(first, parameters(llm)),
        "bytes of the slices": slices,
        "bytes sent": sent.nbytes,
        "bytes sent by bytes of the slices": sent.nbytes / slices,
        "bytes of the whole model": whole,
        "milliseconds a sync, median": 1000 * statistics.median(seconds[1:] or seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--form", default="permuted", choices=["permuted", "indexed", "peft"])
    parser.add_argument("--tiny", action="store_true", help="a tiny random LLaMA in place of SmolLM2-135M")
    parser.add_argument("--model", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(base_folder(folder, options), options)
    for name, value in found.items():
        print(f"{name}: {value}")
    model = "tiny" if options.tiny else "smollm2"
    save(RESULTS / f"slice_sync_{model}_{options.dtype}.json", {"form": options.form, **found})


if __name__ == "__main__":
    main()
