"""Checks that adapters give the same greedy tokens in vLLM as merged checkpoints, in float32 on the CPU.

    make test-vllm ARGUMENTS=tests/vllm_plugin/test_static.py    # makes the environment
    .venv/releases/vllm/bin/python bench/vllm_export.py

The base and two adapters answer together: as s2ft's folders, which the plugin loads, and as exported LoRA folders in a
vLLM without s2ft. Then vLLM serves each merged checkpoint alone and answers the same prompts. The script fails if a
token of an adapter differs, or with the plugin one of the base. Without s2ft vLLM's kernels for processors give answers
of the base the output of an adapter, so these are only counted.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from harness import save

import s2ft
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.vllm_server import vllm_server

RESULTS = Path(__file__).parent / "results" / "vllm_export.json"
CONFIGS = {"ffn": dict(d_ratio=0.03, u_ratio=0.02), "mixed": dict(d_ratio=0.02, o_ratio=0.12, v_ratio=0.34)}
PROMPTS = (
    "The capital of France is",
    "Anna has 12 apples and gives away 5. She has",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The largest planet of the solar system is",
)
NATIVE, EXPORTED = "s2ft's folders", "LoRA folders without s2ft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ranks, prompts = prepare(root)
        names = ["base", *CONFIGS]
        together = {
            way: answers(root, "base", names, prompts, args.tokens, options(root, kind, ranks), variables)
            for way, kind, variables in ((NATIVE, "adapter", {}), (EXPORTED, "lora", {"VLLM_PLUGINS": "none"}))
        }
        alone = {}
        for name in names:
            model = name if name == "base" else f"merged-{name}"
            alone[name] = answers(root, model, ["base"], prompts, args.tokens, [], {})["base"]
    report(args, ranks, together, alone)


def prepare(root: Path) -> tuple[dict[str, list[int]], list[list[int]]]:
    """Write the base, the adapters, the exported LoRA folders and the merged checkpoints.

    Returns:
        The ranks of each exported adapter, and the prompts as token ids.
    """
    ranks = {}
    for seed, (name, ratios) in enumerate(CONFIGS.items()):
        model, tokenizer = load_model(default_model(), "float32")
        if not (root / "base").exists():
            model.save_pretrained(root / "base")
        s2ft.attach(model, s2ft.S2FTConfig(**ratios, seed=seed), name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        s2ft.save_adapter(model, root / f"adapter-{name}")
        s2ft.export_lora(model, root / f"lora-{name}")
        config = json.loads((root / f"lora-{name}" / "adapter_config.json").read_text())
        ranks[name] = sorted({config["r"], *config["rank_pattern"].values()})
        s2ft.merge(model).save_pretrained(root / f"merged-{name}")
    return ranks, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def options(root: Path, kind: str, ranks: dict[str, list[int]]) -> list[str]:
    """vLLM's options for the adapters in the folders of one kind."""
    modules = [f"{name}={root}/{kind}-{name}" for name in CONFIGS]
    highest = max(max(of_adapter) for of_adapter in ranks.values())
    enough = next(rank for rank in (8, 16, 32, 64, 128, 256) if rank >= highest)
    return ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(enough), "--lora-modules", *modules]


def answers(root, model, names, prompts, tokens, more, variables) -> dict[str, list[list[int]]]:
    """The answers of a server to all prompts by each name, asked for at once."""
    with vllm_server(root / model, root / "log", more, variables) as server:
        return server.answers(names, prompts, tokens)


def report(args, ranks, together, alone) -> None:
    equal = {
        way: {name: sum(a == b for a, b in zip(found[name], alone[name])) for name in alone}
        for way, found in together.items()
    }
    changed = {name: sum(a != b for a, b in zip(alone[name], alone["base"])) for name in CONFIGS}
    print(f"ranks {ranks}; answers unlike the base's: {changed} of {len(PROMPTS)}")
    for way, of_way in equal.items():
        print(f"{way}: equal to the merged checkpoint's: {of_way} of {len(PROMPTS)} each")
    results = {"ranks": ranks, "tokens": args.tokens, "prompts": len(PROMPTS), "equal": equal, "unlike base": changed}
    save(args.output, results)
    wanted = [(NATIVE, name) for name in alone] + [(EXPORTED, name) for name in CONFIGS]
    if any(equal[way][name] < len(PROMPTS) for way, name in wanted):
        raise SystemExit("answers differ")


if __name__ == "__main__":
    main()
