"""Reordering the weights of one FFN for the permuted layout, by default with the width of LLaMA-3-8B.

    python bench/convert.py [--width 4096] [--channels 14336] [--ratio 0.03]

"order" computes the new order from the selections of up, gate and down. "move" permutes the three weights in place. It
is compared with indexing in PyTorch, which makes a second matrix of each weight.
"""

import argparse
import statistics
from pathlib import Path

import torch
from harness import interleaved, median_ratio, save

from s2ft.config import S2FTConfig
from s2ft.model.coupling import Coupling, Projection
from s2ft.model.weights import coupling_order
from s2ft.ops import permute_
from s2ft.selection import select

RESULTS = Path(__file__).parent / "results" / "convert.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--channels", type=int, default=14336)
    parser.add_argument("--ratio", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    coupling = Coupling(
        "ffn",
        0,
        (Projection("u", "up", args.channels, 1, 0), Projection("g", "gate", args.channels, 1, 0)),
        Projection("d", "down", args.channels, 1, 1),
    )
    chosen = select([coupling], S2FTConfig(u_ratio=args.ratio, g_ratio=args.ratio, d_ratio=args.ratio))

    def order():
        return coupling_order(args.channels, [chosen["up"], chosen["gate"]], chosen["down"])

    new = order()
    rows = [torch.randn(args.channels, args.width).bfloat16() for _ in range(2)]
    columns = torch.randn(args.width, args.channels).bfloat16()

    def move():
        for weight in rows:
            permute_(weight, new, 0)
        permute_(columns, new, 1)

    def index():
        return [weight[new] for weight in rows], columns[:, new]

    def copy():
        return [weight.clone() for weight in rows], columns.clone()

    times = interleaved({"order": order, "move": move, "torch indexing": index, "copy": copy}, args.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<16}{1000 * seconds:>10.2f} ms")
    faster = median_ratio(times, "torch indexing", "move")
    print(
        f"{args.channels} channels: ordered in {1000 * medians['order']:.2f} ms; "
        f"moved {faster:.1f} × faster than by indexing"
    )
    save(
        RESULTS,
        {
            "width": args.width,
            "channels": args.channels,
            "ratio": args.ratio,
            "seconds": medians,
            "indexing to move": faster,
        },
    )


if __name__ == "__main__":
    main()
