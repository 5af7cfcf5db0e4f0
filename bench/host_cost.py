"""Host time of one layer, forward and backward, with tensors so small that the arithmetic takes no time.

    python bench/host_cost.py [--rounds 40] [--calls 100]

A small model at a small batch waits for the host on every device. The layers run in turn, on one thread. A number is
the tenth percentile of the processor time in all rounds: what else runs on the machine only adds to it.

No optimizer makes steps here, so a layer writes its slice again before every forward that follows a backward. In the
last column 200 layers of a kind run one after another, and their slices are written at once, as in a model. "Least
autograd function" has the products of S2ColumnLinear and nothing else: what PyTorch takes for a function that is
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
PLAIN = {"bias": False, "dtype": torch.bfloat16}
MANY = 200  # layers of a model
COLUMNS = ("forward", "forward and backward", f"both, one of {MANY} layers")
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


def least() -> nn.Module:
    layer = Least(WIDTH, WIDTH, **PLAIN)
    layer.s2 = nn.Parameter(torch.zeros(UNITS, WIDTH))
    return layer


def layers() -> dict[str, Callable[[], nn.Module]]:
    """Functions that make a layer, by name."""
    index = torch.arange(0, WIDTH, WIDTH // UNITS)
    s2 = {**PLAIN, "delta_dtype": torch.float32}
    return {
        "nn.Linear, frozen": lambda: nn.Linear(WIDTH, WIDTH, **PLAIN).requires_grad_(False),
        "nn.Linear, trained": lambda: nn.Linear(WIDTH, WIDTH, **PLAIN),
        "least autograd function": least,
        "S2RowLinear": lambda: s2ft.S2RowLinear(WIDTH, WIDTH, start=0, end=UNITS, **s2),
        "S2ColumnLinear": lambda: s2ft.S2ColumnLinear(WIDTH, WIDTH, start=0, end=UNITS, **s2),
        "S2RowLinear, index": lambda: s2ft.S2RowLinear(WIDTH, WIDTH, index=index, **s2),
        "S2ColumnLinear, index": lambda: s2ft.S2ColumnLinear(WIDTH, WIDTH, index=index, **s2),
        "LoRA r=8, base's dtype": lambda: lora(float32=False),
        "LoRA r=8": lambda: lora(float32=True),
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


def step_of_many(many: list[nn.Module], x: Tensor) -> Callable[[], None]:
    """A function that runs layers one after another, forward and backward. A model writes their slices before it."""
    runs = [repeated(layer, x, 1, backward=True) for layer in many]
    slices = [layer for layer in many if hasattr(layer, "fuse")]

    def run() -> None:
        write_all(slices)
        for one in runs:
            one()

    return run


def microseconds(rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Host time of each layer in µs, by the column of the table."""
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    steps = {}
    for name, make in layers().items():
        layer, many = make(), [make() for _ in range(MANY)]
        steps[name, COLUMNS[0]] = repeated(layer, x, calls, backward=False), calls
        steps[name, COLUMNS[1]] = repeated(layer, x, calls, backward=True), calls
        steps[name, COLUMNS[2]] = step_of_many(many, x), MANY
    gc.collect()
    gc.freeze()  # as timeit does: collections of what other packages have allocated are not a cost of the layers
    times = interleaved({key: step for key, (step, _) in steps.items()}, rounds, timed=processor_seconds)
    found: dict[str, dict[str, float]] = {}
    for (name, column), seconds in times.items():
        found.setdefault(name, {})[column] = 1e6 * statistics.quantiles(seconds, n=10)[0] / steps[name, column][1]
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'µs a layer':<26}" + "".join(f"{column:>24}" for column in COLUMNS)]
    lines += [f"{name:<26}" + "".join(f"{row[column]:>24.1f}" for column in COLUMNS) for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = microseconds(args.rounds, args.calls)
    print(table(rows))
    save(RESULTS, {"microseconds": rows})


if __name__ == "__main__":
    main()
