"""Switching from one adapter to another in all layers of a model, against unmerging and merging LoRAs.

    python bench/switch.py [--channels 46] [--switches 1000] [--model FOLDER_OR_GGUF]

A switch of S²FT is set_adapter to the other one of two loaded adapters. Each has `channels` of every down_proj. A
switch of LoRA is unmerge_adapter and merge_adapter of PEFT. Its rank gives as many numbers, rounded down. After all
switches the weights are compared, bit for bit, with those of a model into which the adapter was just loaded. For LoRA
the difference to the base is printed.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, median_ratio, save
from torch import nn

import s2ft
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

RESULTS = Path(__file__).parent / "results" / "switch.json"


def save_random_adapter(base: nn.Module, ratio: float, seed: int, folder: str) -> None:
    model = copy.deepcopy(base)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=ratio, seed=seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=1e-2)
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


def lora_switch(base: nn.Module, rank: int):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, target_modules=["down_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="a")
    model.add_adapter("b", config)
    model.merge_adapter(["a"])
    state = {"active": "a"}

    def step():
        state["active"] = "b" if state["active"] == "a" else "a"
        model.unmerge_adapter()
        model.merge_adapter([state["active"]])

    return model, step


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def drift(model: nn.Module, base: nn.Module) -> float:
    """The largest difference of a weight to the base, after all adapters are unmerged."""
    weights = dict(base.named_parameters())
    return max(
        (p.float() - weights[key.removeprefix("base_model.model.").replace(".base_layer", "")].float())
        .abs()
        .max()
        .item()
        for key, p in model.named_parameters()
        if "lora_" not in key
    )


def run(base: nn.Module, channels: int, switches: int, rounds: int) -> dict[str, Any]:
    config = base.config
    rank = channels * config.hidden_size // (config.hidden_size + config.intermediate_size)
    with tempfile.TemporaryDirectory() as root:
        folders = {name: f"{root}/{name}" for name in "ab"}
        for seed, folder in enumerate(folders.values()):
            save_random_adapter(base, channels / config.intermediate_size, seed, folder)
        model, step = s2ft_switch(base, folders)
        lora, lora_step = lora_switch(base, rank)
        times = interleaved({"s2ft": step, f"LoRA r={rank}": lora_step}, rounds)
        crowd = 100
        for number in range(crowd - len(folders)):
            s2ft.load_adapter(model, folders["a"], f"other{number}", active=False)
        crowded = interleaved({"s2ft": step}, rounds)["s2ft"]
        for _ in range(switches):
            step()
        name = next(iter(s2ft.status(model).active))
        fresh = copy.deepcopy(base)
        s2ft.load_adapter(fresh, folders[name])
        exact = same(model, fresh)
        s2ft.set_adapter(model, None)
        for _ in range(switches // 10):
            lora_step()
        lora.unmerge_adapter()
    return {
        "milliseconds": {key: 1000 * statistics.median(value) for key, value in times.items()},
        f"milliseconds with {crowd} loaded": 1000 * statistics.median(crowded),
        "LoRA to s2ft": median_ratio(times, f"LoRA r={rank}", "s2ft"),
        "switches": switches,
        "equal to a fresh load": exact,
        "base restored": drift(model, base) == 0.0,
        f"LoRA's drift after {switches // 10} switches": drift(lora, base),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=None, help="folder or GGUF file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--channels", type=int, default=46)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for dtype in ("bfloat16", "float32"):
        base = load_model(args.model or default_model(), dtype)[0].to(device).requires_grad_(False)
        results[dtype] = run(base, args.channels, args.switches, args.rounds)
        print(dtype, results[dtype], flush=True)
        if not results[dtype]["equal to a fresh load"] or not results[dtype]["base restored"]:
            raise SystemExit("the weights after switching differ from those of a fresh load or of the base")
    save(args.output, {"channels": args.channels, "results": results})


if __name__ == "__main__":
    main()
