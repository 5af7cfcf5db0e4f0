"""Every op against PyTorch's operators, LoRA's operators and the floor, in one run with the steps in turn.

    python bench/ops/time_ops.py [op ...] [--seconds 1.0] [--output FILE]

"1.50 × floor": s2ft takes 1.5 times as long as the necessary work alone, a copy of as many bytes or the matrix product.
"2.00 ×" after a rival: s2ft is twice as fast. Times are medians. On a GPU they are taken by device events, and the
cache is emptied before each step.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for harness

import torch
from case import line_of, measure
from harness import machine, save

OPS = ("sliced_linear", "act_mul", "permute_", "scatter_add_", "swap_", "multi_adapter_linear")
RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"one of {', '.join(OPS)}; default: all of them")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case; default: 1")
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        help="default: bench/results/ops_{cpu,gpu}.json if all ops run, else no file",
    )
    args = parser.parse_args()
    unknown = set(args.ops) - set(OPS)
    if unknown:
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    results = []
    for op in args.ops or OPS:
        for case in importlib.import_module(f"{op.rstrip('_')}_times").cases(device):
            results.append(measure(case, device, args.seconds))
            print(line_of(results[-1]), flush=True)
    output = args.output or (None if args.ops else RESULTS / f"ops_{'gpu' if device == 'cuda' else 'cpu'}.json")
    if output is not None:
        save(output, {"results": results})
    print({key: machine().get(key) for key in ("date", "processor", "gpu", "threads", "torch")})


if __name__ == "__main__":
    main()
