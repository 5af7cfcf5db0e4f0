"""Time of every op on the device at LLaMA-3-8B's sizes, against its floor and against other ways.

    python bench/gpu/op_times.py [--only sliced_linear act_mul ...] [--device cpu] [--output FILE]

On a GPU the time is that of a CUDA graph of about 20 calls, divided by their number. The calls take different buffers
in turn, which together are larger than the second-level cache. The host's launches and the cache therefore count for
nothing. Beside it stands the time of one call on an idle GPU, in which the host's part counts ("alone").
The floor is what the bytes and the operations of the op need at least, at the speeds of a copy and of a matrix product
that are measured first. "frozen" is the same product without a trained slice. "reference" is what runs without the
CUDA kernels. LoRA is of rank 16, as two products
and an addition, with its matrices in bfloat16 and in float32, which is how PEFT makes them.
On a CPU the sizes are small and the times are those of the host: they only show that the benchmark runs.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for harness

import torch
import torch.nn.functional as F
from harness import machine
from torch import Tensor

from s2ft.ops import act_mul, indexed_linear, multi_adapter_linear, pack_adapters, sliced_linear

Call = Callable[[], Any]
OPS = torch.ops.s2ft
REFERENCE = {name: import_module(f"s2ft.ops.{name}") for name in ("act_mul", "multi_adapter_linear")}


@dataclass
class KernelCase:
    """One op at one size.

    `calls` do the same on different buffers. `moved` are the bytes that must be read and written, `flops` the
    operations of the products. `rivals` are other ways to the same result.
    """

    op: str
    name: str
    calls: list[Call]
    moved: int = 0
    flops: int = 0
    rivals: dict[str, list[Call]] = field(default_factory=dict)


@dataclass
class Sizes:
    """Tokens, width, FFN channels and the lengths of slices. `sets` buffers are used in turn."""

    tokens: tuple[int, ...]
    width: int
    channels: int
    slices: tuple[tuple[int, int, int], ...]  # units, first unit, dim
    banks: tuple[tuple[int, int], ...]  # adapters, tokens of each sequence
    units: int  # of an adapter in a bank
    sets: int = 4


REAL = Sizes(
    (4096, 512, 64),
    4096,
    14336,
    ((430, 0, 1), (432, 0, 1), (430, 333, 1), (432, 0, 0)),
    ((1, 1), (8, 1), (64, 1), (256, 1), (8, 512)),
    64,
)
SMALL = Sizes((16,), 64, 160, ((5, 3, 1), (8, 0, 0)), ((3, 2),), 4, sets=2)


# --- clocks ---------------------------------------------------------------------------------------


def graph_us(calls: list[Call], rounds: int = 15) -> float:
    """Microseconds of one call inside a CUDA graph, median of `rounds` replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads kernels and makes handles, which a capture can't
        for call in calls:
            call()
    torch.cuda.synchronize()
    count = max(1, 20 // len(calls)) * len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            calls[number % len(calls)]()
    times = []
    for _ in range(3 + rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * begin.elapsed_time(end) / count)
    return statistics.median(times[3:])


def host_us(calls: list[Call], rounds: int = 60) -> float:
    """Microseconds of one call, with the host's part, from an idle device until the call returns to the host."""
    times = []
    for number in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        calls[number % len(calls)]()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[rounds // 4 :])


# --- cases ----------------------------------------------------------------------------------------


def randn(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def slice_cases(sizes: Sizes, device: str) -> Iterator[KernelCase]:
    """sliced_linear, its gradients, and indexed_linear on heads, in a layer like down_proj."""
    width, channels = sizes.width, sizes.channels
    weights = [randn(width, channels, device=device) / 64 for _ in range(sizes.sets)]
    for tokens in sizes.tokens:
        x, grad = randn(tokens, channels, device=device), randn(tokens, width, device=device)
        flops, where = 2 * tokens * width * channels, f"{tokens} × {channels} → {width}"
        frozen = [lambda w=w: F.linear(x, w) for w in weights]
        for units, start, dim in sizes.slices:
            delta = torch.zeros((units, channels) if dim == 0 else (width, units), device=device)
            rivals = {"frozen": frozen}
            if dim == 1:
                rivals["two products"] = [lambda w=w: two_products(x, w, delta, start) for w in weights]
            yield KernelCase(
                "sliced_linear",
                f"{where}, {units} of dim {dim} from {start}",
                [lambda w=w: sliced_linear(x, w, delta, start, dim) for w in weights],
                flops=flops,
                rivals={**rivals, **lora_rivals(x, weights, device)},
            )
            yield KernelCase(
                "sliced_linear, gradient of x",
                f"{where}, {units} of dim {dim} from {start}",
                [
                    lambda w=w: OPS.sliced_linear(grad, w.t(), delta.t(), None, start, 1 - dim, None, None)
                    for w in weights
                ],
                flops=flops,
                rivals={"frozen": [lambda w=w: grad @ w for w in weights]},
            )
            kept = x[:, :units].contiguous()
            yield KernelCase(
                "sliced_linear, gradient of delta",
                f"{where}, {units} units",
                [lambda: (grad.t() @ kept).float()],
                flops=2 * tokens * width * units,
            )
        heads = torch.cat([torch.arange(16) + 16 * head for head in (0, 2)]).to(device)
        delta = torch.zeros(width, len(heads), device=device)
        yield KernelCase(
            "indexed_linear",
            f"{where}, {len(heads)} of dim 1",
            [lambda w=w: indexed_linear(x, w, delta, heads, 1) for w in weights],
            flops=flops,
            rivals={"frozen": frozen},
        )


def two_products(x: Tensor, weight: Tensor, delta: Tensor, start: int) -> Tensor:
    """The delta's own product, added to the output. Its rounding is not that of the merged weight."""
    return F.linear(x, weight).addmm_(x[:, start : start + delta.shape[1]], delta.to(x.dtype).t())


def lora_rivals(x: Tensor, weights: list[Tensor], device: str) -> dict[str, list[Call]]:
    """LoRA's forward as PEFT computes it, with adapters in the base's dtype and in float32."""

    def forward(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, weight)
        return y + (F.linear(F.linear(x.to(a.dtype), a), b) * 2.0).to(y.dtype)

    rivals = {}
    for name, dtype in (("LoRA, base's dtype", x.dtype), ("LoRA, float32", torch.float32)):
        a, b = (
            randn(16, x.shape[1], device=device, dtype=dtype),
            randn(weights[0].shape[0], 16, device=device, dtype=dtype),
        )
        rivals[name] = [lambda w=w, a=a, b=b: forward(w, a, b) for w in weights]
    return rivals


def activation_cases(sizes: Sizes, device: str) -> Iterator[KernelCase]:
    tokens, channels = sizes.tokens[0], sizes.channels
    size = 2 * tokens * channels
    for activation in ("silu", "gelu_tanh"):
        data = [[randn(tokens, channels, device=device) for _ in range(3)] for _ in range(2)]
        plain = F.silu if activation == "silu" else lambda gate: F.gelu(gate, approximate="tanh")
        own = REFERENCE["act_mul"]
        forward = {"two operators": [lambda t=t: plain(t[0]) * t[1] for t in data]}
        backward = {"reference": [lambda t=t: own.reference_backward(t[2], t[0], t[1], activation) for t in data]}
        yield KernelCase(
            "act_mul",
            f"{activation}, {tokens} × {channels}",
            [lambda t=t: act_mul(t[0], t[1], activation) for t in data],
            moved=3 * size,
            rivals=forward,
        )
        yield KernelCase(
            "act_mul, backward",
            f"{activation}, {tokens} × {channels}",
            [lambda t=t: OPS.act_mul_backward(t[2], t[0], t[1], activation) for t in data],
            moved=5 * size,
            rivals=backward,
        )


def bank_cases(sizes: Sizes, device: str) -> Iterator[KernelCase]:
    width, units = sizes.width, sizes.units
    for count, tokens in sizes.banks:
        for dim in (0, 1):
            shape = (units, width) if dim == 0 else (width, units)
            bank = pack_adapters(
                [(torch.randperm(width, device=device)[:units], randn(*shape, device=device)) for _ in range(count)],
                dim,
            )
            x, y = (randn(count, tokens, width, device=device) for _ in range(2))
            names = torch.arange(count, device=device)
            rivals = {"reference": [lambda: REFERENCE["multi_adapter_linear"].reference(x, y, *bank, names, dim)]}
            for name, dtype in (("LoRA, base's dtype", x.dtype), ("LoRA, float32", torch.float32)):
                shapes = (count, width, units // 2), (count, units // 2, width)
                a, b = (randn(*s, device=device, dtype=dtype) for s in shapes)
                rivals[name] = [lambda a=a, b=b: y + torch.bmm(torch.bmm(x.to(a.dtype), a), b).to(y.dtype)]
            yield KernelCase(
                "multi_adapter_linear",
                f"{count} adapters × {tokens} tokens, {units} of dim {dim}",
                [lambda: multi_adapter_linear(x, y, *bank, names, dim)],
                moved=2 * (count * units * width + 3 * count * tokens * width),
                rivals=rivals,
            )


def switch_cases(sizes: Sizes, device: str) -> Iterator[KernelCase]:
    """What a switch of adapters runs on each weight. The index is checked before, as a switch does it once."""
    width, channels = sizes.width, sizes.channels
    units = sizes.slices[0][0]
    weights = [randn(width, channels, device=device) for _ in range(sizes.sets)]
    for dim in (0, 1):
        index = torch.randperm(weights[0].shape[dim], device=device)[:units]
        values = weights[0].index_select(dim, index)
        delta = torch.zeros_like(values, dtype=torch.float32)
        # "by index" writes the sums as index_copy_ does; it reads and writes as many bytes
        yield KernelCase(
            "scatter_add_",
            f"{width} × {channels}, {units} of dim {dim}",
            [lambda w=w: OPS.scatter_add_(w, [index], [delta], dim, [1.0], [values]) for w in weights],
            moved=values.numel() * (4 + 2 + 2 + 2),
            rivals={"by index": [lambda w=w: w.index_add_(dim, index, values) for w in weights]},
        )
        yield KernelCase(
            "swap_",
            f"{width} × {channels}, {units} of dim {dim}",
            [lambda w=w: OPS.swap_(w, index, values, dim) for w in weights],
            moved=values.numel() * 8,
        )
        order = torch.randperm(weights[0].shape[dim], device=device)
        yield KernelCase(
            "permute_",
            f"{width} × {channels}, all of dim {dim}",
            [lambda w=w: OPS.permute_(w, order, dim) for w in weights],
            moved=4 * width * channels,
            rivals={"index_select": [lambda w=w: w.index_select(dim, order) for w in weights]},
        )


GROUPS = {"sliced_linear": slice_cases, "act_mul": activation_cases, "bank": bank_cases, "switch": switch_cases}


# --- measuring ------------------------------------------------------------------------------------


def ceilings(device: str) -> tuple[float, float]:
    """Bytes a microsecond of a copy, and operations a microsecond of a bfloat16 product."""
    size, edge = (1 << 30, 8192) if device == "cuda" else (1 << 20, 128)
    clock = graph_us if device == "cuda" else host_us
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = (randn(edge, edge, device=device) for _ in range(2))
    return 2 * size / clock([lambda: target.copy_(source)]), 2 * edge**3 / clock([lambda: a @ b])


def measure(case: KernelCase, copied: float, multiplied: float, device: str) -> dict[str, Any]:
    clock = graph_us if device == "cuda" else host_us
    floor = max(case.moved / copied, case.flops / multiplied)
    return {
        "op": case.op,
        "case": case.name,
        "us": clock(case.calls),
        "floor_us": floor,
        "alone_us": host_us(case.calls),
        "rivals_us": {name: clock(calls) for name, calls in case.rivals.items()},
    }


def line(row: dict[str, Any]) -> str:
    rivals = "  ".join(f"{name} {us:.1f}" for name, us in row["rivals_us"].items())
    return (
        f"{row['op']:<33}{row['case']:<44}{row['us']:>10.1f} µs{row['us'] / row['floor_us']:>7.2f} × floor, "
        f"alone {row['alone_us']:.1f}   {rivals}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="JSON file, written after each case")
    args = parser.parse_args()
    torch.manual_seed(0)
    copied, multiplied = ceilings(args.device)
    print(f"ceilings: copy {copied / 1e6:.3f} TB/s, bfloat16 product {multiplied / 1e6:.2f} TFLOP/s", flush=True)
    rows = []
    for group in args.only:
        for case in GROUPS[group](REAL if args.device == "cuda" else SMALL, args.device):
            with torch.no_grad():
                rows.append(measure(case, copied, multiplied, args.device))
            print(line(rows[-1]), flush=True)
            if args.output:
                rates = {"copy_TBs": copied / 1e6, "product_TFLOPs": multiplied / 1e6}
                args.output.write_text(json.dumps({"machine": machine(), **rates, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
