"""Training steps of S²FT, LoRA, full fine-tuning and the frozen model on one base with random weights.

    python bench/gpu/steps.py [--shape llama-3-8b] [--methods frozen s2ft ...] [--liger] [--profile] [--output FILE]

The methods take the same base one after another. Each is put on, measured and taken off, and the base's bits are then
compared with those before: by a sum over all weights that depends on every bit and its place. "frozen again"
shows how much the machine's speed changed in between. Times are medians of device events; on a CPU they are of the
host. The peak is that of the allocated memory, weights included.

    frozen      the forward and the gradients down to the inputs; trains nothing
    s2ft        d_ratio=0.03
    lora5       PEFT, rank 16 on q, k, v, up and down (the paper's choice), adapters in the base's dtype
    lora7       the same on all linear layers of the blocks
    lora5-fp32, lora7-fp32   as PEFT makes them: float32 adapters, also on a bfloat16 base
    full        every weight is trained, AdamW's state in the base's dtype

With experts, s2ft has d_ratio=0.125, and lora is of rank 8 on the experts' gate_up_proj and down_proj.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for harness and shapes

import torch
from harness import machine
from shapes import SHAPES, has_experts, random_model
from torch import Tensor, nn

import s2ft

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TARGETS = {"lora5": FIVE, "lora7": [*FIVE, "o_proj", "gate_proj"]}
DENSE = ("frozen", "s2ft", "lora7", "lora5", "lora7-fp32", "lora5-fp32", "frozen again", "full")
EXPERTS = ("frozen", "s2ft", "lora", "lora-fp32", "frozen again")
WARMUP = 3


# --- methods --------------------------------------------------------------------------------------


@contextmanager
def s2ft_on(model: nn.Module, ratio: float) -> Iterator[nn.Module]:
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=ratio), verify=False)
    try:
        yield model
    finally:
        s2ft.detach(model)


@contextmanager
def lora_on(model: nn.Module, float32: bool, **config: Any) -> Iterator[nn.Module]:
    """PEFT's LoRA. Its default makes float32 adapters on a half-precision base too."""
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **config)
    tuned = get_peft_model(model, options, autocast_adapter_dtype=float32)
    try:
        yield tuned
    finally:
        tuned.unload()


@contextmanager
def full_on(model: nn.Module) -> Iterator[nn.Module]:
    model.requires_grad_(True)
    try:
        yield model
    finally:
        model.requires_grad_(False)


@contextmanager
def nothing_on(model: nn.Module) -> Iterator[nn.Module]:
    yield model


def on(method: str, model: nn.Module, experts: bool):
    """A context in which the model is prepared for a method."""
    which = method.partition("-")[0]
    if which == "s2ft":
        return s2ft_on(model, 0.125 if experts else 0.03)
    if which == "full":
        return full_on(model)
    if which == "lora":
        layers = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        return lora_on(model, method.endswith("fp32"), r=8, lora_alpha=16, target_modules=[], target_parameters=layers)
    if which in TARGETS:
        return lora_on(model, method.endswith("fp32"), r=16, lora_alpha=32, target_modules=TARGETS[which])
    return nothing_on(model)


# --- measuring ------------------------------------------------------------------------------------


def checksum(tensors: list[Tensor]) -> int:
    """A sum over the bits of all tensors that changes with every bit and with the place of every element."""
    total = 0
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        for number, piece in enumerate(bits.split(1 << 22)):
            place = torch.arange(piece.numel(), device=piece.device, dtype=torch.int64)
            # An odd factor for every place, made by a multiplicative hash. The sums wrap around.
            factors = ((place + number) * -7046029254386353131).bitwise_xor(place << 7) | 1
            total += int((piece.to(torch.int64) * factors).sum())
    return total % (1 << 64)


class Step:
    """One training step of a prepared model. A call returns the loss, without waiting for the device."""

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        self.model, self.batch = model.train(), batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=batch.is_cuda) if self.trained else None

    def __call__(self) -> Tensor:
        embedded = self.model.get_input_embeddings()(self.batch)
        if not self.trained:
            embedded = embedded.detach().requires_grad_()
        loss = self.model(inputs_embeds=embedded, labels=self.batch).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


def timed(step: Step, count: int) -> dict[str, Any]:
    """Run the step `WARMUP + count` times. Returns times in milliseconds, memory in bytes, and the last loss."""
    cuda = step.batch.is_cuda
    device_ms, host_ms = [], []
    for number in range(WARMUP + count):
        if cuda:
            torch.cuda.synchronize()
            if number == WARMUP:
                torch.cuda.reset_peak_memory_stats()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        start = time.perf_counter()
        loss = step()
        host = 1000 * (time.perf_counter() - start)
        if cuda:
            end.record()
            torch.cuda.synchronize()
        if number >= WARMUP:
            host_ms.append(host)
            device_ms.append(begin.elapsed_time(end) if cuda else host)
    middle = statistics.median(device_ms)
    return {
        "ms": middle,
        "quartiles": statistics.quantiles(device_ms, n=4)[::2],
        "host_ms": statistics.median(host_ms),
        "tokens_per_second": 1000 * step.batch.numel() / middle,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "loss": float(loss),
        "trained": sum(p.numel() for p in step.trained),
    }


# Names in kernels, by what they do. What no row names is counted as elementwise.
KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "wgmma", "splitkreduce"),
    "attention": ("flash", "fmha", "attention"),
    "s2ft": ("s2ft", "for_units", "act_mul", "add_inputs", "add_outputs"),
    "optimizer": ("adam", "multi_tensor"),
    "loss": ("softmax", "nll", "cross_entropy"),
    "copies": ("memcpy", "memset", "copy", "cat"),
}


def profiled(step: Step) -> dict[str, Any]:
    """The kernels of one step: how many, and milliseconds by kind and of the longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    names: dict[str, float] = {}
    count = 0
    for event in found.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        name = event.name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise")
        for table, key in ((kinds, kind), (names, event.name[:90])):
            table[key] = table.get(key, 0) + event.device_time / 1000
        count += 1
    longest = sorted(names.items(), key=lambda pair: -pair[1])[:15]
    return {"kernels": count, "kinds_ms": kinds, "longest_ms": dict(longest)}


def measure(method: str, model: nn.Module, batch: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Put a method on the model, measure it, and take it off. The base is compared with before, bit for bit."""
    everything = list(model.parameters())
    before = checksum(everything)
    with on(method, model, has_experts(args.shape)) as prepared:
        step = Step(prepared, batch)
        result = timed(step, args.steps)
        if args.profile and batch.is_cuda:
            result.update(profiled(step))
        del step
    if method != "full":
        result["base_as_before"] = checksum(list(model.parameters())) == before
    return result


def memory_left() -> int | None:
    """Bytes that tensors take on the GPU after everything unused is freed."""
    gc.collect()
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def attempt(method: str, model: nn.Module, batch: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """`measure`, or the reason why the method did not run."""
    try:
        return measure(method, model, batch, args)
    except torch.OutOfMemoryError:
        return {"not_run": "does not fit into this GPU's memory"}
    except Exception as error:  # the other methods still run; the report counts this one as failed
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3-8b")
    parser.add_argument("--methods", nargs="+", choices=sorted({*DENSE, *EXPERTS}), default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12, help=f"measured steps, after {WARMUP} others")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--liger", action="store_true", help="Liger-Kernel's norms, rotary positions, FFN and loss")
    parser.add_argument("--profile", action="store_true", help="count the kernels of one step more (GPU only)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file, written after each method")
    args = parser.parse_args()
    if args.liger:  # before the model is made, as transformers' use_liger_kernel does
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    methods = args.methods or (EXPERTS if has_experts(args.shape) else DENSE)
    model = random_model(args.shape, getattr(torch, args.dtype), args.device)
    batch = torch.randint(model.config.vocab_size, (args.batch, args.length), device=args.device)
    results = {}
    for method in methods:
        left = memory_left()
        results[method] = {**attempt(method, model, batch, args), "bytes_before": left}
        print(method, json.dumps(results[method]), flush=True)
        if args.output:
            about = {key: str(value) for key, value in vars(args).items() if key not in ("output", "methods")}
            args.output.write_text(json.dumps({"machine": machine(), **about, "results": results}, indent=1) + "\n")
    if any("error" in result for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
