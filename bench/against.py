"""Compares a training step of this checkout with that of another checkout of the project, steps in turn.

    git worktree add ../before COMMIT && (cd ../before && python setup.py build_ext --inplace)
    python bench/against.py ../before [--dtype float32|bfloat16|both] [--rounds 40] [--compile]
        [--model FOLDER_OR_GGUF | --shape width-2048-4-layers]

Each checkout runs in a process of its own, which waits while the other one runs a step. Changes of the machine's speed
therefore affect both. The script prints the median and the quartiles of the ratios of neighbouring steps, this checkout
to the other one; the operators that a step dispatches, views left out, which on a GPU are launches; and the bytes that
a forward keeps. With --compile the model is one graph (``fullgraph=True``), whose compilation is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from shapes import add_model_options

HERE = Path(__file__).resolve().parent.parent


def serve(options: dict[str, Any]) -> None:
    """Print facts about a step, and then its seconds for every line of input, in the process of a checkout."""
    import torch
    import train_step
    from shapes import base_of
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view and function is not torch.ops.aten._unsafe_view.default:
                self.found += 1
            return function(*args, **kwargs or {})

    args = argparse.Namespace(**options)
    base = base_of(args, args.dtype, "cpu")[0]
    tokens = torch.randint(
        base.config.vocab_size, (args.batch, args.length), generator=torch.Generator().manual_seed(0)
    )
    step = train_step.TimedMethod(train_step.s2ft_model(base, args.d_ratio), tokens)
    step()
    facts = {"MiB kept": step.bytes_kept() / 2**20}
    with Count() as count:
        step()
    facts["operators"] = count.found
    if args.compile:
        step.model.compile(fullgraph=True)
        start = time.perf_counter()
        step()
        facts["seconds of compilation"] = time.perf_counter() - start
        facts["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print("facts", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print("seconds", time.perf_counter() - start, flush=True)


class Checkout:
    """A process that runs steps of a checkout."""

    def __init__(self, root: Path, dtype: str, args: argparse.Namespace) -> None:
        options = {name: value for name, value in vars(args).items() if name != "other"} | {"dtype": dtype}
        code = f"import runpy; runpy.run_path({__file__!r})['serve']({options!r})"
        path = os.pathsep.join([str(root), str(root / "bench")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

        self.facts = json.loads(self._answer("facts "))

    def _answer(self, what: str) -> str:
        for line in self.process.stdout:
            if line.startswith(what):
                return line.removeprefix(what)
        raise SystemExit("a checkout's process ended: run its bench/train_step.py to see why")

    def step(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._answer("seconds "))

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
    low, middle, high = statistics.quantiles([mine / other for mine, other in pairs], n=4)
    mine, other = (1000 * statistics.median(times) for times in zip(*pairs))
    lines = [f"{dtype}: {mine:.1f} ms against {other:.1f} ms, ratio {middle:.4f} ({low:.4f} to {high:.4f})"]
    lines += [f"  {name}: {value:,.0f} against {theirs.facts[name]:,.0f}" for name, value in ours.facts.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="the root of another checkout, built in place")
    add_model_options(parser)
    parser.add_argument("--compile", action="store_true", help="compile the model as one graph")
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
