"""How far the base moves when an adapter is merged and unmerged again and again, as RL does it at each step.

    python bench/merge_drift.py [--cycles 1000] [--layers 4] [--dtype bfloat16]
        [--model FOLDER_OR_GGUF | --shape llama-3.2-1b]

All adapters are merged and unmerged by PEFT's merge_adapter and unmerge_adapter, and take a small random step before
each cycle, as training would. S²FT trains units of o_proj and down_proj, LoRA has the same modules and at most as many
numbers. Its adapters are in the base's dtype, or in float32, as PEFT makes them. A base weight counts as changed if any
of its bits differ from those before the first cycle. The share is of the weights of the adapted modules, and of all
weights that are kept in the model (`--layers` of its layers).
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from harness import save
from peft import LoraConfig, get_peft_model
from shapes import add_model_options, base_name, base_of
from torch import nn

from s2ft.peft import S2FTPeftConfig

RESULTS = Path(__file__).parent / "results" / "merge_drift.json"
TARGETS = ("o_proj", "down_proj")
RATIOS = dict(d_ratio=0.03, o_ratio=0.12)


def bits(weight: torch.Tensor) -> torch.Tensor:
    """The weight's numbers as integers, so that equal means equal in all bits."""
    return weight.detach().view(torch.int16 if weight.element_size() == 2 else torch.int32)


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's weights by name, without those of the adapter."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "s2ft_delta" not in name
    }


def step(model: nn.Module, size: float, generator: torch.Generator) -> None:
    """Move the adapter a little, as an update would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((size * noise).to(parameter.dtype))


def drift(model: nn.Module, cycles: int) -> dict[str, Any]:
    """Merge and unmerge, and count the changed weights after the first cycle and after the last."""
    kept = {name: bits(weight).clone() for name, weight in base_weights(model).items()}
    adapted = {name for name in kept if any(f".{target}." in name for target in TARGETS)}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for cycle in range(1, cycles + 1):
        step(model, 1e-3, generator)
        model.merge_adapter()
        model.unmerge_adapter()
        if cycle in (1, cycles):
            now = base_weights(model)
            changed = {name: int((bits(now[name]) != before).sum()) for name, before in kept.items()}
            size = sum(kept[name].numel() for name in adapted)
            moved = sum((now[name].float() - kept[name].view(now[name].dtype).float()).abs().sum() for name in adapted)
            mean = sum(kept[name].view(now[name].dtype).float().abs().sum() for name in adapted)
            found[f"after {cycle}"] = {
                "changed": sum(changed.values()),
                "share of adapted modules": sum(changed[name] for name in adapted) / size,
                "share of all weights": sum(changed.values()) / sum(one.numel() for one in kept.values()),
                "mean movement by mean size": float(moved / mean),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    add_model_options(parser)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = base_of(options, options.dtype)[0]
    model.model.layers = model.model.layers[: options.layers]
    slices = get_peft_model(copy.deepcopy(model), S2FTPeftConfig(**RATIOS), autocast_adapter_dtype=False)
    count = sum(parameter.numel() for parameter in slices.parameters() if parameter.requires_grad)
    rank = 1
    while lora_size(model, rank + 1) <= count:
        rank += 1
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), init_lora_weights=False)
    loras = {
        name: get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=float32)
        for name, float32 in (("LoRA, base's dtype", False), ("LoRA, as PEFT makes it", True))
    }
    results = {"cycles": options.cycles, "layers": options.layers, "dtype": options.dtype, "lora rank": rank}
    results["base"] = base_name(options)
    for name, tuned in {"S²FT": slices, **loras}.items():
        results[name] = drift(tuned, options.cycles)
        for key, value in results[name].items():
            print(f"{name:23} {key}: {value}", flush=True)
    save(options.output, results)


def lora_size(model: nn.Module, rank: int) -> int:
    """The numbers of a LoRA of this rank on the adapted modules."""
    modules = [module for name, module in model.named_modules() if name.endswith(TARGETS)]
    return sum(rank * (module.in_features + module.out_features) for module in modules)


if __name__ == "__main__":
    main()
