"""Compares a training step of this checkout with that of another checkout of the project, steps in turn.

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext --inplace)
    python bench/against.py ../before [--dtype float32|bfloat16|both] [--rounds 40] [--model FOLDER_OR_GGUF]

Each checkout runs in a process of its own, which waits while the other one runs a step. Changes of the machine's speed
therefore affect both. The script prints the median and the quartiles of the ratios of neighbouring steps, this checkout
to the other one.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def serve(dtype: str, model: str, batch: int, length: int, d_ratio: float) -> None:
    """Run a step and print its seconds for every line of input. This runs in the process of a checkout."""
    import torch
    from train_step import TimedMethod, s2ft_model

    from s2ft.text.models import load_model
    from s2ft.train.demo import default_model

    base = load_model(model or default_model(), dtype)[0]
    tokens = torch.randint(base.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    step = TimedMethod(s2ft_model(base, d_ratio), tokens)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print("seconds", time.perf_counter() - start, flush=True)


class Checkout:
    """A process that runs steps of a checkout."""

    def __init__(self, root: Path, dtype: str, args: argparse.Namespace) -> None:
        code = (
            f"from against import serve; serve({dtype!r}, {args.model!r}, {args.batch}, {args.length}, {args.d_ratio})"
        )
        path = os.pathsep.join([str(root), str(root / "bench"), str(HERE / "bench")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def step(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit("a checkout's process ended: run its bench/train_step.py to see why")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(dtype: str, args: argparse.Namespace) -> str:
    ours, theirs = Checkout(HERE, dtype, args), Checkout(args.other.resolve(), dtype, args)
    pairs = []
    for turn in range(args.rounds + 3):
        first, second = (ours, theirs) if turn % 2 else (theirs, ours)
        times = {first: first.step(), second: second.step()}
        if turn >= 3:  # the first ones warm up
            pairs.append((times[ours], times[theirs]))
    ours.close()
    theirs.close()
    ratios = [mine / other for mine, other in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (
        f"{dtype}: {1000 * statistics.median(mine for mine, _ in pairs):.1f} ms against "
        f"{1000 * statistics.median(other for _, other in pairs):.1f} ms, ratio {middle:.4f} ({low:.4f} to {high:.4f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the root of another checkout, built in place")
    parser.add_argument("--model", default=None, help="folder or GGUF file; default: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--d-ratio", type=float, default=0.03)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    for dtype in ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,):
        print(compare(dtype, args), flush=True)


if __name__ == "__main__":
    main()
