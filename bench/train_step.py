"""A training step of S²FT against LoRA, full fine-tuning and the frozen model, in one process with the steps in turn.

    python bench/train_step.py [--dtype float32|bfloat16|both] [--rounds 12]
        [--model FOLDER_OR_GGUF | --shape width-2048-4-layers] [--floor] [--keep-memory]

"frozen" is the floor: it runs the forward and the gradients down to the inputs, and trains nothing. LoRA is measured
with adapters in the base's dtype, and as PEFT makes it: with float32 adapters, on a bfloat16 base too.
Bytes kept for backward: every storage that autograd saves during a forward, counted once, without parameters.
"""

import argparse
import copy
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, median_ratio, save
from shapes import add_model_options, base_name, base_of
from torch import nn

import s2ft
from s2ft.layers import S2Layer
from s2ft.train.device import keep_freed_memory

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RESULTS = Path(__file__).parent / "results" / "train_step.json"
# Both are of rank 16. On a float32 base they are the same.
LORA, LORA_OF_PEFT = "LoRA, base's dtype", "LoRA, as PEFT makes it"
AGAINST = {LORA: "to LoRA", LORA_OF_PEFT: "to PEFT's", "frozen": "to frozen"}


class TimedMethod:
    """A model prepared for training, and its optimizer. A call runs one step."""

    def __init__(self, model: nn.Module, batch: torch.Tensor, inputs_need_grad: bool = False) -> None:
        self.model, self.batch, self.inputs_need_grad = model.train(), batch, inputs_need_grad
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None

    def loss(self) -> torch.Tensor:
        embedded = self.model.get_input_embeddings()(self.batch)
        if self.inputs_need_grad:
            embedded = embedded.detach().requires_grad_()
        return self.model(inputs_embeds=embedded, labels=self.batch).loss

    def __call__(self) -> None:
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def bytes_kept(self) -> int:
        of_model = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        kept: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in of_model:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        total = sum(kept.values())
        del loss
        return total

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.trained)


def s2ft_model(base: nn.Module, d_ratio: float) -> nn.Module:
    model = copy.deepcopy(base)
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=d_ratio))
    return model


def lora_model(base: nn.Module, rank: int, targets, copied: bool = True, float32: bool = True) -> nn.Module:
    """LoRA of PEFT. Its adapters are float32 on a half-precision base too, unless `float32` is False."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(base) if copied else base, config, autocast_adapter_dtype=float32)


def lora_of_equal_size(base: nn.Module, parameters: int) -> nn.Module:
    """LoRA on the same projections as that of rank 16, with the rank that gives about `parameters` parameters."""
    per_rank = sum(
        sum(module.weight.shape) for name, module in base.named_modules() if name.rpartition(".")[2] in LORA_TARGETS
    )
    return lora_model(base, max(1, round(parameters / per_rank)), LORA_TARGETS)


def without_slices(model: nn.Module) -> nn.Module:
    """The least that a step with these trained layers can take: s2ft's FFN kernel, and gradients down to the first one.

    The trainable layers are plain products here. No slice is written or gets a gradient.
    """
    for layer in [module for module in model.modules() if isinstance(module, S2Layer)]:
        layer.s2.requires_grad_(False)
        layer.forward = partial(_plain_product, layer)
    return model


def _plain_product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    return y if y.requires_grad else y.requires_grad_()  # the gradients of S²FT end at its first layer


def methods(base: nn.Module, batch: torch.Tensor, d_ratio: float, floor: bool) -> dict[str, TimedMethod]:
    tuned = TimedMethod(s2ft_model(base, d_ratio), batch)
    frozen = TimedMethod(copy.deepcopy(base).requires_grad_(False), batch, inputs_need_grad=True)
    if floor:
        return {
            "S²FT": tuned,
            "without its slices": TimedMethod(without_slices(s2ft_model(base, d_ratio)), batch),
            "frozen": frozen,
        }
    return {
        LORA_OF_PEFT: TimedMethod(lora_model(base, 16, LORA_TARGETS), batch),
        LORA: TimedMethod(lora_model(base, 16, LORA_TARGETS, float32=False), batch),
        "S²FT": tuned,
        "LoRA, as many parameters": TimedMethod(lora_of_equal_size(base, tuned.parameters), batch),
        "full": TimedMethod(copy.deepcopy(base).requires_grad_(True), batch),
        "frozen": frozen,
    }


def run(base: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    batch = torch.randint(
        base.config.vocab_size, (args.batch, args.length), generator=torch.Generator().manual_seed(0)
    ).to(base.device)
    steps = methods(base, batch, args.d_ratio, args.floor)
    kept = {name: method.bytes_kept() for name, method in steps.items()}
    times = interleaved(steps, args.rounds)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            **{f"ratio to {other}": median_ratio(times, name, other) for other in AGAINST if other in times},
            "MiB kept": kept[name] / 2**20,
            "trained parameters": steps[name].parameters,
            "all seconds": times[name],
        }
        for name in steps
    }


def table(title: str, rows: dict[str, Any]) -> str:
    columns = {heading: f"ratio to {other}" for other, heading in AGAINST.items()}
    columns = {heading: key for heading, key in columns.items() if all(key in row for row in rows.values())}
    ratios = "".join(f"{heading:>11}" for heading in columns)
    lines = [title, f"{'':<26}{'ms a step':>10}{ratios}{'MiB kept':>10}{'trained':>13}"]
    for name, row in rows.items():
        ratios = "".join(f"{row[key]:>11.3f}" for key in columns.values())
        lines.append(
            f"{name:<26}{1000 * row['seconds']:>10.0f}{ratios}{row['MiB kept']:>10.0f}{row['trained parameters']:>13,}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_options(parser)
    parser.add_argument("--floor", action="store_true", help="compare S²FT with the frozen model alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--d-ratio", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory of the CPU for the next tensor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.keep_memory and not keep_freed_memory():
        parser.error("--keep-memory needs glibc")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        results[dtype] = run(base_of(args, dtype, device)[0], args)
        print(table(f"{dtype}, {args.batch} × {args.length} tokens", results[dtype]), flush=True)
    sizes = {"base": base_name(args), "batch": args.batch, "length": args.length, "d_ratio": args.d_ratio}
    sizes["keep_memory"] = args.keep_memory
    save(args.output, {**sizes, "results": results})


if __name__ == "__main__":
    main()
