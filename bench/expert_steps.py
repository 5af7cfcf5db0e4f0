"""A training step of a mixture of experts: S²FT against the frozen model and LoRA, in one process, steps in turn.

    python bench/expert_steps.py [--experts 32 128] [--dtype float32 bfloat16] [--rounds 15]

The model is a Qwen3-MoE of 4 layers, width 256, with 4 experts of width 256 for each token. "frozen" is the floor: the
forward by transformers' grouped_mm and the gradients down to the inputs. LoRA's adapters are in the base's dtype, or in
float32, as PEFT makes them. Times are those of the process, which other
processes on the machine change little: forward and backward, and once more with AdamW's step. An operator is what
PyTorch dispatches, without views; on a GPU each is at least one launch.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, median_ratio, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import TimedMethod

import s2ft

RESULTS = Path(__file__).parent / "results" / "expert_steps.json"
# Both are of rank 8 on gate_up and down.
LORA, LORA_OF_PEFT = "LoRA, base's dtype", "LoRA, as PEFT makes it"
VIEWS = (
    "view",
    "reshape",
    "transpose",
    "aten.t.",
    "permute",
    "expand",
    "select",
    "slice",
    "split",
    "squeeze",
    "detach",
)


def base_model(experts: int, dtype: torch.dtype, layers: int) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=experts,
        num_experts_per_tok=4,
        vocab_size=512,
        experts_implementation="grouped_mm",
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config).to(dtype).requires_grad_(False)


class ExpertStep(TimedMethod):
    """Forward and backward of a model, and the step of its optimizer."""

    def __call__(self) -> tuple[float, float]:
        """Run one step. Returns the process times of forward and backward, and of the whole step."""
        begin = time.process_time()
        self.loss().backward()
        between = time.process_time()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return between - begin, time.process_time() - begin

    def operators(self) -> int:
        with _Count() as count:
            self.loss().backward()
        return count.operators


class _Count(TorchDispatchMode):
    operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += not any(view in str(function) for view in VIEWS)
        return function(*args, **(kwargs or {}))


def s2ft_model(base: nn.Module, **ratios: float) -> nn.Module:
    model = copy.deepcopy(base)
    s2ft.attach(model, s2ft.S2FTConfig(**ratios), verify=False)
    return model


def lora_model(base: nn.Module, *names: str, float32: bool) -> nn.Module:
    """PEFT's LoRA. Its adapters are float32 on a half-precision base too, unless `float32` is False."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in names]
    )
    return get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=float32)


def steps_of(base: nn.Module, batch: Tensor) -> dict[str, ExpertStep]:
    made = {
        "frozen": copy.deepcopy(base),
        "S²FT d=0.125": s2ft_model(base, d_ratio=0.125),
        "S²FT d=u=0.125": s2ft_model(base, d_ratio=0.125, u_ratio=0.125),
        "S²FT o=0.25": s2ft_model(base, o_ratio=0.25),
        LORA: lora_model(base, "gate_up_proj", "down_proj", float32=False),
    }
    if base.dtype != torch.float32:  # on a float32 base it would be the same model again
        made[LORA_OF_PEFT] = lora_model(base, "gate_up_proj", "down_proj", float32=True)
    return {name: ExpertStep(model, batch, inputs_need_grad=True) for name, model in made.items()}


def run(experts: int, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    base = base_model(experts, dtype, args.layers)
    batch = torch.randint(512, (4, 128), generator=torch.Generator().manual_seed(0))
    steps = steps_of(base, batch)
    measured = interleaved(steps, args.rounds, warmup=1, timed=ExpertStep.__call__)
    times, updated = ({name: [pair[i] for pair in found] for name, found in measured.items()} for i in (0, 1))
    operators = {name: step.operators() for name, step in steps.items()}
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "ratio to frozen": median_ratio(times, name, "frozen"),
            "ratio to LoRA": median_ratio(times, name, LORA),
            "ratio to frozen, with AdamW": median_ratio(updated, name, "frozen"),
            "ratio to LoRA, with AdamW": median_ratio(updated, name, LORA),
            "operators": operators[name],
            "operators, ratio to frozen": operators[name] / operators["frozen"],
            "trained parameters": steps[name].parameters,
            "all seconds": times[name],
        }
        for name in steps
    }


def table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"{title:<30}{'ms':>6}{'to frozen':>11}{'to LoRA':>9}{'with AdamW':>12}{'operators':>11}{'':>7}"]
    lines += [
        f"{name:<30}{1000 * row['seconds']:>6.0f}{row['ratio to frozen']:>11.3f}{row['ratio to LoRA']:>9.3f}"
        f"{row['ratio to frozen, with AdamW']:>12.3f}{row['operators']:>11}{row['operators, ratio to frozen']:>7.2f}"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for experts in args.experts:
        for dtype in args.dtype:
            title = f"{experts} experts, {dtype}"
            results[title] = run(experts, getattr(torch, dtype), args)
            print(table(title, results[title]), flush=True)
            save(RESULTS, {"results": results})


if __name__ == "__main__":
    main()
