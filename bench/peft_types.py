"""S²FT as a method of PEFT with target_modules="all-linear" on a tiny model of every type of transformers.

    python bench/peft_types.py [--types bert llama ...] [--again] [--workers 2] [--ratio 0.5]

A type passes if S²FT can be injected, the model still computes the same, every delta whose module runs gets a gradient
where a full weight gets one, the adapter is saved and loaded by PEFT, and the loaded one merges into the same weights,
bit for bit, which compute what was trained. PEFT's own LoRA, injected with the same target_modules, is the bar: each
row says whether it can be injected. Models are built from cut default configs, with random weights.

The rows are in bench/results/peft_types.json.
"""

import argparse
import copy
import inspect
import io
import json
import multiprocessing as mp
import os
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from harness import machine
from model_types import tiny_model_of, types
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from s2ft.model.discovery.examples import run_example, runnable_example
from s2ft.peft import S2FTPeftConfig, S2FTPeftLayer

RESULTS = Path(__file__).parent / "results" / "peft_types.json"
SECONDS = 120  # of one type
CLOSE = 1e-4  # relative difference of outputs that are the same but for rounding


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors of an output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def difference(model: nn.Module, example: Any, expected: list[Tensor] | None) -> float:
    """The largest relative difference of the model's outputs to the expected ones."""
    if expected is None:
        return 0.0
    with torch.no_grad():
        torch.manual_seed(0)
        found = tensors(run_example(model, example))
    pairs = [(one, two) for one, two in zip(found, expected) if two.numel()]
    return max(float((one - two).abs().max() / (two.abs().max() + 1e-12)) for one, two in pairs)


def gradients(model: nn.Module, example: Any) -> None:
    torch.manual_seed(0)
    outputs = [tensor for tensor in tensors(run_example(model, example)) if tensor.requires_grad]
    sum(
        (tensor.double() * torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor)).sum() for tensor in outputs
    ).backward()


def without_gradient(base: nn.Module, model: PeftModel, example: Any) -> tuple[int, list[str]]:
    """How many modules run and get a gradient in full training, and which of those get none in their delta."""
    full = copy.deepcopy(base).requires_grad_(True)
    if isinstance(example, dict) and "use_cache" in inspect.signature(base.forward).parameters:
        example = {**example, "use_cache": False}  # a cache may be written to between forward and backward
    gradients(full, example)
    gradients(model, example)
    trained = {
        path: module for path, module in model.get_base_model().named_modules() if isinstance(module, S2FTPeftLayer)
    }
    running, missing = 0, []
    for path, layer in trained.items():
        weight = full.get_submodule(path).weight
        if weight.grad is not None and bool(weight.grad.any()):
            running += 1
            values = layer.s2ft_delta["default"].values
            # the selected units may be among those whose part of the gradient is zero
            part = layer.kind.view(weight.grad).index_select(layer.dim, layer.s2ft_delta["default"].index)
            if values.grad is None or (bool(part.any()) and not bool(values.grad.any())):
                missing.append(path)
    return running, missing


def check(model_type: str, name: str, ratio: float) -> dict[str, Any]:
    """The row of one model type."""
    row: dict[str, Any] = {"type": model_type, "class": name}
    try:
        base = tiny_model_of(model_type)
    except Exception as error:
        return {**row, "built": short(error)}
    try:
        get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear", r=2))
        row["lora"] = "ok"
    except Exception as error:
        row["lora"] = short(error)
    try:
        example, _ = runnable_example(base)
        torch.manual_seed(0)
        with torch.no_grad():
            expected = tensors(run_example(base, example))
    except Exception as error:
        example, expected, row["example"] = None, None, short(error)
    try:
        row.update(trial(base, example, expected, ratio))
    except Exception as error:
        row["s2ft"] = short(error)
    return row


def trial(base: nn.Module, example: Any, expected: list[Tensor] | None, ratio: float) -> dict[str, Any]:
    config = S2FTPeftConfig(target_modules="all-linear", ratio=ratio)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    found = {"modules": len(config.module_units), "uncoupled": len(config.uncoupled), "skipped": config.skipped or []}
    if (changed := difference(model, example, expected)) > CLOSE:
        return {**found, "s2ft": f"the output changes by {changed:.1e}"}
    if example is not None:
        found["with_gradient"], missing = without_gradient(base, model, example)
        if missing:
            return {**found, "s2ft": f"no gradient reaches {', '.join(missing[:3])}"}
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, S2FTPeftLayer):
                layer.s2ft_delta["default"].values.normal_(std=0.02)
    if expected is not None:
        with torch.no_grad():
            torch.manual_seed(0)
            expected = tensors(run_example(model, example))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
    merged = model.merge_and_unload()
    ours, theirs = merged.state_dict(), again.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
        return {**found, "s2ft": "the loaded adapter merges into other weights"}
    if (changed := difference(merged, example, expected)) > CLOSE:
        return {**found, "s2ft": f"merging changes the output by {changed:.1e}"}
    return {**found, "s2ft": "ok"}


def child(pipe, *args) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with redirect_stdout(io.StringIO()):
        pipe.send(check(*args))


def run(names: dict[str, str], ratio: float, workers: int) -> list[dict[str, Any]]:
    """Check each type in a process of its own, which may die or be stopped."""
    context, waiting, running, rows = mp.get_context("fork"), list(names.items()), {}, []
    while waiting or running:
        while waiting and len(running) < workers:
            model_type, name = waiting.pop(0)
            ours, theirs = context.Pipe()
            process = context.Process(target=child, args=(theirs, model_type, name, ratio))
            process.start()
            theirs.close()
            running[model_type] = process, ours, time.monotonic()
        mp.connection.wait([pipe for _, pipe, _ in running.values()], timeout=5)
        for model_type, (process, pipe, start) in list(running.items()):
            late = time.monotonic() - start > SECONDS
            if not (pipe.poll() or late):
                continue
            try:
                row = pipe.recv() if pipe.poll() else {"type": model_type, "s2ft": f"not done after {SECONDS} s"}
            except EOFError:
                row = {"type": model_type, "s2ft": "the process died"}
            if late:
                process.kill()
            process.join()
            del running[model_type]
            rows.append(row)
            print(row["type"], "|", row.get("lora", "-"), "|", row.get("s2ft", row.get("built")), flush=True)
    return sorted(rows, key=lambda row: row["type"])


def passes(row: dict[str, Any]) -> bool:
    return row.get("s2ft") == "ok"


def summary(rows: list[dict[str, Any]]) -> dict[str, int]:
    """The counts of a table."""
    taken = [row for row in rows if row.get("lora") == "ok"]
    return {
        "types": len(rows),
        "built": sum("built" not in row for row in rows),
        "lora": len(taken),
        "s2ft": sum(map(passes, rows)),
        "s2ft_of_lora": sum(map(passes, taken)),
        "with_example": sum("lora" in row and "example" not in row for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", help="check these types only, and write no table")
    parser.add_argument("--again", action="store_true", help="check the rows of the table that do not pass once more")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.5)
    options = parser.parse_args()
    names = {key: found[0][1] for key, found in sorted(types().items()) if not options.types or key in options.types}
    kept = [row for row in json.loads(RESULTS.read_text())["rows"] if passes(row)] if options.again else []
    for row in kept:
        names.pop(row["type"], None)
    rows = sorted(kept + run(names, options.ratio, options.workers), key=lambda row: row["type"])
    print(summary(rows))
    if not options.types:
        head = {**machine(), "transformers": transformers.__version__, "ratio": options.ratio, **summary(rows)}
        RESULTS.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
