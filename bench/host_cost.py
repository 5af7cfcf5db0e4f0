"""Host time of one layer, forward and backward, with tensors so small that the arithmetic takes no time.

    python bench/host_cost.py [--rounds 40] [--calls 100]

A small model at a small batch waits for the host on every device. The layers run in turn, on one thread. A number is
the tenth percentile of the processor time in all rounds: what else runs on the machine only adds to it.

No optimizer makes steps here, so a layer writes its slice again before every forward that follows a backward. A model
writes all slices at once, after a step and before the next forward: the last line has the time of that for one layer.
"Least autograd function" has the products of S2ColumnLinear and nothing else: what PyTorch takes for a function that is
written in Python.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from harness import interleaved, processor_seconds, save
from torch import Tensor, nn

import s2ft
from s2ft.layers.base import write_all

WIDTH, UNITS, ROWS = 16, 8, 4
MANY = 200  # layers whose slices are written at once
RESULTS = Path(__file__).parent / "results" / "host_cost.json"


def lora(float32: bool) -> nn.Module:
    """A bfloat16 linear layer with LoRA of rank 8: float32 adapters, as PEFT makes them, or the base's dtype."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(torch.bfloat16)
    config = LoraConfig(r=8, target_modules=["0"], lora_dropout=0.0)
    return get_peft_model(model, config, autocast_adapter_dtype=float32).base_model.model[0].train()


class LeastFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, s2):
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, None, grad[:, :UNITS].t() @ x


class Least(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return LeastFunction.apply(x, self.weight.detach(), self.s2)


def layers() -> dict[str, nn.Module]:
    """The layers by name."""
    plain = {"bias": False, "dtype": torch.bfloat16}
    least = Least(WIDTH, WIDTH, **plain)
    least.s2 = nn.Parameter(torch.zeros(UNITS, WIDTH))
    index = torch.arange(0, WIDTH, WIDTH // UNITS)
    s2 = {"bias": False, "dtype": torch.bfloat16, "delta_dtype": torch.float32}
    return {
        "nn.Linear, frozen": nn.Linear(WIDTH, WIDTH, **plain).requires_grad_(False),
        "nn.Linear, trained": nn.Linear(WIDTH, WIDTH, **plain),
        "least autograd function": least,
        "S2RowLinear": s2ft.S2RowLinear(WIDTH, WIDTH, start=0, end=UNITS, **s2),
        "S2ColumnLinear": s2ft.S2ColumnLinear(WIDTH, WIDTH, start=0, end=UNITS, **s2),
        "S2RowLinear, index": s2ft.S2RowLinear(WIDTH, WIDTH, index=index, **s2),
        "S2ColumnLinear, index": s2ft.S2ColumnLinear(WIDTH, WIDTH, index=index, **s2),
        "LoRA r=8, base's dtype": lora(float32=False),
        "LoRA r=8": lora(float32=True),
    }


def repeated(layer: nn.Module, x: Tensor, calls: int, backward: bool) -> Callable[[], None]:
    """A function that runs the layer `calls` times, and its backward if `backward`."""
    gradient = torch.ones(ROWS, WIDTH, dtype=x.dtype)

    def run() -> None:
        for _ in range(calls):
            y = layer(x)
            if backward:
                y.backward(gradient)

    return run


def microseconds(rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Host time of each layer in µs: of the forward, and of forward and backward."""
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    found = layers()
    gc.collect()
    gc.freeze()  # as timeit does: collections of what other packages have allocated are not a cost of the layers
    steps = {(name, both): repeated(layer, x, calls, both) for name, layer in found.items() for both in (False, True)}
    times = interleaved(steps, rounds, timed=processor_seconds)
    per_call = {key: 1e6 * statistics.quantiles(seconds, n=10)[0] / calls for key, seconds in times.items()}
    return {name: {"forward": per_call[name, False], "forward and backward": per_call[name, True]} for name in found}


def microseconds_of_writes(rounds: int) -> float:
    """Host time in µs of writing one of MANY slices at once."""
    many = [s2ft.S2RowLinear(WIDTH, WIDTH, start=0, end=UNITS, delta_dtype=torch.float32) for _ in range(MANY)]
    times = interleaved({"write": lambda: write_all(many)}, rounds, timed=processor_seconds)
    return 1e6 * statistics.quantiles(times["write"], n=10)[0] / MANY


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'µs a layer':<26}{'forward':>10}{'forward and backward':>22}"]
    lines += [f"{name:<26}{row['forward']:>10.1f}{row['forward and backward']:>22.1f}" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = microseconds(args.rounds, args.calls)
    written = microseconds_of_writes(args.rounds)
    print(table(rows))
    print(f"slices of {MANY} layers written at once: {written:.1f} µs a layer")
    save(args.output, {"microseconds": rows, "written at once": written})


if __name__ == "__main__":
    main()
