"""How long attach takes, and the proof in it: with and without verify, and the operators that a proof launches.

    python bench/attach.py [--threads 2]

The models have random weights, in the shapes of SmolLM2-135M and Llama-3.2-1B.
Operators are counted on one and on two blocks of a small Llama, and follow for 32 blocks, as Llama-3.1-8B has.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import save
from shapes import random_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import s2ft

RESULTS = Path(__file__).parent / "results" / "attach.json"
CONFIG = s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.1)
SHAPES = {"SmolLM2-135M": "smollm2-135m", "Llama-3.2-1B": "llama-3.2-1b"}


class Counter(TorchDispatchMode):
    """Counts operators that compute something: views launch nothing."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(result.alias_info for result in func._schema.returns) or func._schema.is_mutable
        return func(*args, **(kwargs or {}))


def launches(layers: int, verify: bool | None) -> int:
    sizes = dict(hidden_size=256, intermediate_size=896, num_attention_heads=4, num_key_value_heads=1, vocab_size=512)
    config = LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=True)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    with Counter() as counter:
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.25), verify=verify)
    return counter.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            model = random_model(shape, dtype)
            seconds: dict[str, list[float]] = {"with": [], "without": []}
            for number in range(options.rounds + 1):
                for key, verify in (("with", None), ("without", False)):
                    start = time.perf_counter()
                    s2ft.attach(model, CONFIG, verify=verify)
                    if number:
                        seconds[key].append(time.perf_counter() - start)
                    s2ft.detach(model)
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            results[key] = {f"{k} proof, s": round(statistics.median(found), 2) for k, found in seconds.items()}
            print(key, results[key], flush=True)
    counts = [launches(layers, None) - launches(layers, False) for layers in (1, 2)]
    each = counts[1] - counts[0]
    results["operators of a proof"] = {"each block": each, "else": counts[0] - each, "32 blocks": counts[0] + 31 * each}
    print(results["operators of a proof"])
    save(RESULTS, results)


if __name__ == "__main__":
    main()
