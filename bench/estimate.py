"""The memory that s2ft.estimate predicts, against the memory that training uses.

    python bench/estimate.py [--models NAME ...] [--dtype float32|bfloat16|both]

Each model in each dtype is estimated on the meta device in this process, and built and trained in a process of its own,
which measures
- the bytes kept for backward: every storage that autograd saves during a forward, counted once;
- parameters, gradients and optimizer states: the growth of memory after a step on two tokens, which leaves hardly
  anything else;
- the peak: the largest growth of memory during a step on the whole batch.
Memory is the resident memory of the process, which returns freed memory at once, or the allocated memory of a GPU. At
the end a model of LLaMA-3-8B's shape is estimated but not measured.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from experiments.memory import PeakMemory, return_freed_memory, size_of_process
from harness import in_process, save
from shapes import random_model, write_base
from train_step import TimedMethod
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

import s2ft
from s2ft.text.models import locate
from s2ft.train.demo import default_model

SMOLLM = "SmolLM2-135M"
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=32000)
SHAPE = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12)
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {  # random weights, at sizes near 100M parameters
    "llama": lambda: LlamaConfig(**SHAPE, **IDS),
    "qwen2": lambda: Qwen2Config(**SHAPE, **IDS, num_key_value_heads=4, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SHAPE, **IDS, num_key_value_heads=4, head_dim=64, sliding_window=64),
    "phi3": lambda: Phi3Config(**SHAPE, **IDS, num_key_value_heads=4),
    "gpt2": lambda: GPT2Config(bos_token_id=1, eos_token_id=2),  # GPT-2's own 124M, with its dropout
}
CONFIG = s2ft.S2FTConfig(d_ratio=0.03, o_ratio=0.1)
SHOWN = {"kept": "kept for backward", "state": "weights, gradients, states", "peak": "peak of a step"}
RESULTS = Path(__file__).parent / "results" / "estimate.json"


# ---- estimating, in this process ----------------------------------------------------------------------


def on_meta(name: str, dtype: torch.dtype) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(name), dtype=dtype)


def _config(name: str) -> PretrainedConfig:
    if name != SMOLLM:
        return CONFIGS[name]()
    source, options = locate(default_model())
    return AutoConfig.from_pretrained(source, **options)


def estimated(name: str, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    begin = time.perf_counter()
    model = on_meta(name, getattr(torch, dtype))
    built = time.perf_counter()
    found = s2ft.estimate(model, CONFIG, args.batch, args.length, device=_device())
    return {
        "kept": found.kept,
        "state": found.parameters + found.buffers + found.gradients + found.optimizer,
        "peak": found.peak,
        "building seconds": built - begin,
        "seconds": time.perf_counter() - built,
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---- measuring, in a process of its own ------------------------------------------------------------------


def measured(name: str, dtype: str, args: argparse.Namespace) -> dict[str, int]:
    # without this setting glibc would keep freed memory, and the measured growth would be too small
    options = (f"--measure={name}", f"--dtype={dtype}", f"--batch={args.batch}", f"--length={args.length}")
    return in_process(__file__, *options, MALLOC_MMAP_THRESHOLD_="262144")


def measure(name: str, dtype: torch.dtype, batch: int, length: int) -> dict[str, int]:
    """Measure in bytes. A small model runs a step before, because the memory of libraries must not count."""
    small = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8, vocab_size=99
    )
    _method(AutoModelForCausalLM.from_config(small, dtype=dtype), batch, length)()
    with _folder(name, dtype) as folder:
        before = _used()
        if folder is None:
            model = AutoModelForCausalLM.from_config(_config(name), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    method = _method(model, batch, length)
    full_batch, method.batch = method.batch, method.batch[:1, :2]
    _step(method)
    state = _used() - before
    method.batch = full_batch
    method()
    _used()  # returns freed memory
    memory = PeakMemory(_device())
    memory.forget_peak()
    _step(method)
    return {"state": state, "peak": memory.peak() + memory.before - before, "kept": method.bytes_kept()}


@contextmanager
def _folder(name: str, dtype: torch.dtype) -> Iterator[str | None]:
    """A folder with the checkpoint of SmolLM2, because reading a GGUF file would leave tens of MiB. None for others."""
    if name != SMOLLM:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        yield write_base(folder, str(dtype).removeprefix("torch."))


def _step(method: TimedMethod) -> None:
    """Run a step that keeps the gradients."""
    method.loss().backward()
    method.optimizer.step()


def _method(model: torch.nn.Module, batch: int, length: int) -> TimedMethod:
    model = model.to(_device())
    s2ft.attach(model, CONFIG)
    tokens = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    return TimedMethod(model, tokens.to(_device()))


def _used() -> int:
    return_freed_memory()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return size_of_process("VmRSS")


# ---- all together ----------------------------------------------------------------------------------------


def row(name: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    predicted, found = estimated(name, dtype, args), measured(name, dtype, args)
    ratios = {what: predicted[what] / found[what] for what in SHOWN}
    print(
        f"{name:<14}{dtype:<10}"
        + "".join(f"{predicted[what] / 2**20:>10.1f}{found[what] / 2**20:>10.1f}{ratios[what]:>8.4f}" for what in SHOWN)
        + f"{predicted['seconds']:>10.1f}",
        flush=True,
    )
    return {"estimated": predicted, "measured": found, "estimated to measured": ratios}


def plan_8b() -> dict[str, float]:
    begin = time.perf_counter()
    model = random_model("llama-3-8b", torch.bfloat16, "meta")
    built = time.perf_counter()
    found = s2ft.estimate(model, s2ft.S2FTConfig(d_ratio=0.03), 4, 1024)
    seconds = {"building seconds": built - begin, "seconds": time.perf_counter() - built}
    print(
        f"\nLLaMA-3-8B's shape in bfloat16, 4 × 1024 tokens, d_ratio 0.03: built on the meta device in "
        f"{seconds['building seconds']:.1f} s, estimated in {seconds['seconds']:.1f} s\n{found}"
    )
    not_of_the_shape = ("parts", "free", "fits")
    return {**seconds, **{name: value for name, value in found.to_dict().items() if name not in not_of_the_shape}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=(SMOLLM, *CONFIGS), default=[SMOLLM, *CONFIGS])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--measure", choices=(SMOLLM, *CONFIGS), help=argparse.SUPPRESS)  # set in the measuring process
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, getattr(torch, args.dtype), args.batch, args.length)))
        return
    print(
        f"MiB estimated, measured, and their ratio; {args.batch} × {args.length} tokens\n{'':<24}"
        + "".join(f"{title:>28}" for title in SHOWN.values())
        + f"{'seconds':>10}"
    )
    dtypes = ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,)
    results = {name: {dtype: row(name, dtype, args) for dtype in dtypes} for name in args.models}
    save(
        RESULTS,
        {
            "batch": args.batch,
            "length": args.length,
            "config": {"d_ratio": 0.03, "o_ratio": 0.1},
            "results": results,
            "LLaMA-3-8B on the meta device": plan_8b(),
        },
    )


if __name__ == "__main__":
    main()
