"""Switching from one adapter to another in all layers of a model, against unmerging and merging LoRAs.

    python bench/switch.py [--channels 46] [--switches 1000] [--model FOLDER_OR_GGUF | --shape llama-3.2-1b]

A switch of S²FT is set_adapter to the other one of two loaded adapters. Each has `channels` of every down_proj. A
switch of LoRA is unmerge_adapter and merge_adapter of PEFT. Its rank gives as many numbers, rounded down, and its
adapters are in the base's dtype, or in float32, as PEFT makes them. After all switches the weights are compared, bit
for bit, with those of a model into which the adapter was just loaded. For LoRA the difference to the base is printed.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import drift, fill_slices, interleaved, loras_of, median_ratio, same_bits, save
from shapes import add_model_options, base_name, base_of
from torch import nn

import s2ft

RESULTS = Path(__file__).parent / "results" / "switch.json"
LORAS = ("LoRA, base's dtype", "LoRA, as PEFT makes it")  # the same on a float32 base, on which the first alone runs


def save_random_adapter(base: nn.Module, ratio: float, seed: int, folder: str) -> None:
    model = copy.deepcopy(base)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=ratio, seed=seed))
    fill_slices(model, std=1e-2)
    s2ft.save_adapter(model, folder)


def s2ft_switch(base: nn.Module, folders: dict[str, str]):
    """The model with both adapters loaded, and a step that switches to the inactive one."""
    model = copy.deepcopy(base)
    for name, folder in folders.items():
        s2ft.load_adapter(model, folder, name)

    names = itertools.cycle(folders)

    def step():
        s2ft.set_adapter(model, next(names))

    return model, step


def lora_switch(base: nn.Module, rank: int, float32: bool):
    """PEFT's LoRA. Its adapters are float32 on a half-precision base too, unless `float32` is False."""
    model = loras_of(base, "ab", rank, autocast_adapter_dtype=float32)
    model.merge_adapter(["a"])
    names = itertools.cycle("ba")

    def step():
        model.unmerge_adapter()
        model.merge_adapter([next(names)])

    return model, step


def run(base: nn.Module, channels: int, switches: int, rounds: int) -> dict[str, Any]:
    config = base.config
    rank = channels * config.hidden_size // (config.hidden_size + config.intermediate_size)
    with tempfile.TemporaryDirectory() as root:
        folders = {name: f"{root}/{name}" for name in "ab"}
        for seed, folder in enumerate(folders.values()):
            save_random_adapter(base, channels / config.intermediate_size, seed, folder)
        model, step = s2ft_switch(base, folders)
        loras = {name: lora_switch(base, rank, name == LORAS[1]) for name in LORAS[: 1 + (base.dtype != torch.float32)]}
        times = interleaved({"s2ft": step, **{name: lora_step for name, (_, lora_step) in loras.items()}}, rounds)
        crowd = 100
        for number in range(crowd - len(folders)):
            s2ft.load_adapter(model, folders["a"], f"other{number}", active=False)
        crowded = interleaved({"s2ft": step}, rounds)["s2ft"]
        for _ in range(switches):
            step()
        name = next(iter(s2ft.status(model).active))
        fresh = copy.deepcopy(base)
        s2ft.load_adapter(fresh, folders[name])
        exact = same_bits(model, fresh)
        s2ft.set_adapter(model, None)
        for lora, lora_step in loras.values():
            for _ in range(switches // 10):
                lora_step()
            lora.unmerge_adapter()
    return {
        "rank of LoRA": rank,
        "milliseconds": {key: 1000 * statistics.median(value) for key, value in times.items()},
        f"milliseconds with {crowd} loaded": 1000 * statistics.median(crowded),
        **{f"{name} to s2ft": median_ratio(times, name, "s2ft") for name in loras},
        "switches": switches,
        "equal to a fresh load": exact,
        "base restored": same_bits(model, base),
        f"drift after {switches // 10} switches": {name: drift(lora, base) for name, (lora, _) in loras.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_options(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels", type=int, default=46)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    results = {}
    for dtype in ("bfloat16", "float32"):
        base = base_of(args, dtype, args.device)[0].requires_grad_(False)
        results[dtype] = run(base, args.channels, args.switches, args.rounds)
        print(dtype, results[dtype], flush=True)
        if not results[dtype]["equal to a fresh load"] or not results[dtype]["base restored"]:
            raise SystemExit("the weights after switching differ from those of a fresh load or of the base")
    save(args.output, {"base": base_name(args), "channels": args.channels, "results": results})


if __name__ == "__main__":
    main()
