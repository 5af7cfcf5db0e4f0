"""A batch with many adapters (AdapterBank) against switching between them, the base, and PEFT's mixed batches.

    python bench/mixed_batches.py [--model FOLDER_OR_GGUF | --shape llama-3.2-1b] [--tokens 32] [--rounds 5]

The adapters are random, have d_ratio 0.03 of every down_proj, and are saved on disk. Every method generates the same
number of tokens greedily in float32. There are three comparisons:
(a) 16 sequences with 8 adapters: one batch, against set_adapter and a batch for each adapter, and against set_adapter
    and one sequence after the other. The logits of a forward must be those of each adapter alone. Whether the tokens
    are the same is printed; where two are nearly as likely, another order of rounding may choose the other one.
(b) The same batch against the base.
(c) A batch with 8 and with 64 adapters against PEFT's LoRA with adapter_names. The LoRA has as many bytes, rounded
    down. The base is float32, so that PEFT's adapters are in the base's dtype in any case.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, loras_of, median_ratio, save
from shapes import add_model_options, base_name, base_of
from torch import Tensor, nn

import s2ft
from s2ft.adapter import native
from s2ft.adapter.adapter import Adapter
from s2ft.attached.bank import AdapterBank
from s2ft.attached.record import new_record
from s2ft.model.coupling import projections_of
from s2ft.model.weights import Delta, weight_at

RESULTS = Path(__file__).parent / "results" / "mixed_batches.json"
RATIO, STD = 0.03, 3e-2
TOLERANCE = 1e-4  # of the logits, relative to the largest, in float32
BEGINNINGS = (
    "The capital of France is",
    "Once upon a time",
    "Two and two make",
    "In the middle of the night, she",
    "A good recipe for soup",
    "The sun",
    "Dear Sir or Madam,",
    "He opened the door and saw",
)


def write_adapters(base: nn.Module, count: int, root: str) -> list[str]:
    """Write random adapters, each into a folder. Returns their names."""
    record = new_record(base)
    for seed in range(count):
        torch.manual_seed(seed)
        config = s2ft.S2FTConfig(d_ratio=RATIO, seed=seed)
        selection = s2ft.select(base, config)
        deltas = {}
        for projection in projections_of(record.couplings):
            if projection.name in selection:
                index = projection.elements(selection[projection.name])
                deltas[projection.name] = Delta(
                    1, index, torch.randn(weight_at(base, projection).shape[0], len(index)) * STD
                )
        native.write(Adapter(str(seed), config, selection, record.fingerprint, deltas), f"{root}/{seed}")
    return [str(seed) for seed in range(count)]


def prompts(tokenizer, count: int, device: str) -> dict[str, Tensor]:
    """A batch of prompts with different lengths, padded on the left."""
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    texts = [f"{i}. {BEGINNINGS[i % len(BEGINNINGS)]}" for i in range(count)]
    return {name: ids.to(device) for name, ids in tokenizer(texts, padding=True, return_tensors="pt").items()}


class Generation:
    """Generates `tokens` new tokens for every row of `inputs`, for any model."""

    def __init__(self, inputs: dict[str, Tensor], tokens: int) -> None:
        self.inputs, self.tokens = inputs, tokens

    def __call__(self, model: nn.Module, rows=slice(None), **more) -> Tensor:
        begin = self.inputs["input_ids"].shape[1]
        return model.generate(
            **{key: value[rows] for key, value in self.inputs.items()},
            do_sample=False,
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            **more,
        )[:, begin:]


def switching(model: nn.Module, generate: Generation, names: list[str]):
    """Two steps: one batch for each adapter, and one sequence at a time. Both return tokens in the batch's order."""

    def by_adapter() -> Tensor:
        out = torch.empty(len(names), generate.tokens, dtype=torch.int64, device=model.device)
        for name in dict.fromkeys(names):
            rows = torch.tensor([row for row, one in enumerate(names) if one == name])
            s2ft.set_adapter(model, name)
            out[rows] = generate(model, rows)
        return out

    def one_by_one() -> Tensor:
        out = []
        for row, name in enumerate(names):
            s2ft.set_adapter(model, name)
            out.append(generate(model, slice(row, row + 1)))
        return torch.cat(out)

    return by_adapter, one_by_one


def lora_of(base: nn.Module, names: list[str]) -> nn.Module:
    """A PEFT model with a random LoRA for every name. Each has as many numbers as our adapters, rounded down."""
    config = base.config
    units = int(RATIO * config.intermediate_size)
    return loras_of(base, names, units * config.hidden_size // (config.hidden_size + config.intermediate_size))


def difference_to_alone(base, switched, bank: AdapterBank, inputs: dict[str, Tensor], names: list[str]) -> float:
    """The largest difference of a batch's logits to those of each sequence alone, relative to the largest logit.

    `switched` is a copy of the base with all adapters loaded. Padding is left out, because its logits mean nothing.
    """
    with bank.batch(names):
        together = base(**inputs).logits
    largest = 0.0
    for row, name in enumerate(names):
        s2ft.set_adapter(switched, name)
        alone = switched(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
        real = inputs["attention_mask"][row].bool()
        found = (together[row] - alone)[real].abs().max() / alone[real].abs().max()
        largest = max(largest, float(found))
    return largest


def against_switching(
    base: nn.Module, bank: AdapterBank, generate: Generation, names: list[str], root: str, rounds: int
) -> dict[str, Any]:
    model = copy.deepcopy(base)
    for name in dict.fromkeys(names):
        s2ft.load_adapter(model, f"{root}/{name}", name)
    by_adapter, one_by_one = switching(model, generate, names)

    def batch() -> Tensor:
        with bank.batch(names):
            return generate(base)

    difference = difference_to_alone(base, model, bank, generate.inputs, names)
    equal = torch.equal(batch(), one_by_one()) and torch.equal(batch(), by_adapter())
    plain = generate(base)
    steps = {"batch": batch, "by adapter": by_adapter, "one by one": one_by_one}
    times = interleaved(steps, rounds, warmup=0)  # all steps ran just before
    return {
        "difference of the logits to those alone": difference,
        "same tokens as alone": equal,
        "sequences unlike the base's": int((batch() != plain).any(1).sum()),
        "seconds": medians(times),
        "by adapter to batch": median_ratio(times, "by adapter", "batch"),
        "one by one to batch": median_ratio(times, "one by one", "batch"),
    }


def against_peft(
    base: nn.Module, bank: AdapterBank, generate: Generation, names: list[str], rounds: int
) -> dict[str, Any]:
    """Compare a batch with PEFT's mixed batch and with the base, in the same rounds."""
    lora = lora_of(base, list(dict.fromkeys(names)))

    def batch() -> Tensor:
        with bank.batch(names):
            return generate(base)

    steps = {"batch": batch, "base": lambda: generate(base), "PEFT": lambda: generate(lora, adapter_names=names)}
    times = interleaved(steps, rounds, warmup=1)
    rate = len(names) * generate.tokens
    return {
        "adapters": len(set(names)),
        "sequences": len(names),
        "seconds": medians(times),
        "tokens a second": {name: rate / seconds for name, seconds in medians(times).items()},
        "throughput to the base's": median_ratio(times, "base", "batch"),
        "PEFT to batch": median_ratio(times, "PEFT", "batch"),
    }


def entering(bank: AdapterBank, names: list[str]) -> dict[str, float]:
    """Milliseconds to enter a batch of 8 adapters that are on disk, loaded but not packed, or already packed."""

    def enter(chosen: list[str]) -> float:
        begin = time.perf_counter()
        with bank.batch(chosen):
            return 1000 * (time.perf_counter() - begin)

    first = enter(names[8:16])
    enter(names[:8])
    packing = [enter(names[8 * (i % 2) :][:8]) for i in range(1, 10)]
    return {
        "from disk": first,
        "packing": statistics.median(packing),
        "packed": statistics.median(enter(names[8:16]) for _ in range(9)),
    }


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def run(base: nn.Module, tokenizer, tokens: int, rounds: int) -> dict[str, Any]:
    results = {"load before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as root, torch.no_grad():  # s2ft refuses to attach in inference mode
        names = write_adapters(base, 64, root)
        bank = AdapterBank(base, root)
        results["milliseconds to enter"] = entering(bank, names)
        print(results, flush=True)
        eight = names[:8] * 2
        small, large = (Generation(prompts(tokenizer, count, base.device), tokens) for count in (16, 64))
        results["switching"] = against_switching(base, bank, small, eight, root, max(2, rounds // 2))
        print(results["switching"], flush=True)
        for key, generate, chosen in (("8 adapters", small, eight), ("64 adapters", large, names)):
            results[key] = against_peft(base, bank, generate, chosen, rounds)
            print(key, results[key], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_options(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    base, tokenizer = base_of(args, "float32", args.device)
    base.requires_grad_(False)
    base.generation_config.pad_token_id = tokenizer.eos_token_id
    results = run(base, tokenizer, args.tokens, args.rounds)
    save(args.output, {"base": base_name(args), "tokens": args.tokens, "rounds": args.rounds, "results": results})
    if not results["switching"]["difference of the logits to those alone"] <= TOLERANCE:
        raise SystemExit("the logits of the batch differ from those of its sequences one by one")


if __name__ == "__main__":
    main()
