"""What a step of GRPO costs when the engine gets slices, merged LoRA, a LoRA adapter, or all weights.

    python bench/grpo_cost.py [--ways slices full] [--dtype bfloat16] [--steps 8]     # needs vLLM

All are TRL's GRPOTrainer with the same prompts and arguments, and vLLM in the same process. Each way has a process of
its own. The processes take turns step by step, so that they meet the same machine.

    slices           S²FT, with_slices(GRPOTrainer): the trained slices are written into the engine's weights
    lora-merged      LoRA as TRL does it: merge, send every parameter, unmerge. On a float32 base, as in the published
                     results, its adapters are in the base's dtype and as PEFT makes them at once
    lora-adapter     LoRA: the adapter is saved, and the engine loads it under a new name at each step
    full             every parameter is trained and sent, as TRL does it

On a CPU engines leave their weights unpacked, because nothing can be written into packed ones; the one of lora-adapter,
into which nothing is written, packs them. All answers have the same number of tokens. "Changed" is the share of the
trainer's frozen weights whose bits are not those of the base after the run.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import save
from shapes import write_base

VARIABLES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
             "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "grpo_cost.json"
WAYS = ("slices", "lora-merged", "lora-adapter", "full")
WARMUP = 2  # steps that are not measured
RATIOS = dict(d_ratio=0.03, o_ratio=0.12)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
TURN = "turn: "


# ---- in the process of one way ---------------------------------------------------------------------------


def short(completions, **_) -> list[float]:
    """The reward: fewer characters are better, so that answers differ."""
    return [-len(completion) / 100 for completion in completions]


class Way:
    """One way, and what its steps cost."""

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name, self.options, self.folder = options.child, options, folder
        self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.costs: dict[str, float] = {}
        self.syncs = 0
        self.trainer = self._make()
        self.base = self._frozen()
        self._watch()

    def _make(self):
        import trl.generation.vllm_generation as generation
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        from s2ft.sync.trl_trainers import choose_port

        options = self.options
        rows = min(16, options.answers)
        arguments = GRPOConfig(
            output_dir=self.folder, max_steps=WARMUP + options.steps, per_device_train_batch_size=rows,
            gradient_accumulation_steps=options.answers // rows, num_generations=8,
            max_completion_length=options.tokens, learning_rate=1e-5, use_vllm=True,
            vllm_mode="colocate", vllm_max_model_length=128, report_to=[], save_strategy="no",
            generation_kwargs={"ignore_eos": True},
            bf16=False, use_cpu=True, logging_steps=1, disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        texts = [f"{a} times {b} is" for a in range(12) for b in range(12)]
        given = {"args": arguments, "train_dataset": Dataset.from_list([{"prompt": text} for text in texts])}
        given |= {"processing_class": self.tokenizer, "callbacks": [Turns(self)]}
        llm = {"enforce_eager": True}
        if self.name == "slices":
            import s2ft
            from s2ft.sync import with_slices

            s2ft.attach(self.model, s2ft.S2FTConfig(**RATIOS, layout="indexed"))
            return with_slices(GRPOTrainer, llm=llm)(self.model, short, **given)
        if self.name.startswith("lora"):
            from peft import LoraConfig

            given["peft_config"] = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, lora_dropout=0.0)
        if self.name == "lora-adapter":
            llm |= {"enable_lora": True, "max_lora_rank": RANK}
        else:
            llm |= {"weight_transfer_config": {"backend": "s2ft"}}  # leaves weights unpacked
        llm |= {"dtype": options.dtype}
        generation.LLM = partial(generation.LLM, **llm)
        choose_port()  # TRL would give processes that start together the same port
        return GRPOTrainer(self.model, short, **given)

    # ---- what is measured ----------------------------------------------------------------------------

    def _watch(self) -> None:
        engine = self.trainer.vllm_generation
        generate, sync = engine.llm.generate, engine.sync_weights
        if self.name == "lora-adapter":
            sync = self._load_adapter
        elif self.name != "slices":
            self._count_bytes(engine)

        def timed_generate(*given, **options):
            if self.name == "lora-adapter":
                options["lora_request"] = self.request
            began = time.perf_counter()
            outputs = generate(*given, **options)
            self.costs["rollout_seconds"] = time.perf_counter() - began
            self.costs["tokens"] = sum(len(one.token_ids) for output in outputs for one in output.outputs)
            return outputs

        def timed_sync():
            self.costs["bytes"] = 0
            began = time.perf_counter()
            sent = sync()
            self.costs["sync_seconds"] = time.perf_counter() - began
            if self.name == "slices":
                self.costs["bytes"] = sent.nbytes

        engine.llm.generate, engine.sync_weights = timed_generate, timed_sync

    def _count_bytes(self, engine) -> None:
        each = engine._iter_named_params

        def counted():
            for name, parameter in each():
                self.costs["bytes"] += parameter.numel() * parameter.element_size()
                yield name, parameter

        engine._iter_named_params = counted

    def _load_adapter(self) -> None:
        """Save the adapter and let the engine load it under a new name. The former one goes."""
        from vllm.lora.request import LoRARequest

        engine = self.trainer.vllm_generation.llm
        folder = Path(self.folder) / f"adapter-{self.syncs}"
        self.trainer.model.save_pretrained(folder)
        if self.syncs:
            engine.llm_engine.remove_lora(self.syncs)
        self.syncs += 1
        self.request = LoRARequest(f"step-{self.syncs}", self.syncs, str(folder))
        engine.llm_engine.add_lora(self.request)
        engine.reset_prefix_cache()
        self.costs["bytes"] = (folder / "adapter_model.safetensors").stat().st_size

    def _frozen(self) -> dict[str, torch.Tensor]:
        """Copies of the frozen weights, in the trainer's memory."""
        named = self.trainer.model.named_parameters()
        return {name: one.detach().clone() for name, one in named if not one.requires_grad}

    def changed(self) -> float | None:
        """The share of the frozen weights whose bits have changed."""
        if not self.base:
            return None
        now = dict(self.trainer.model.named_parameters())
        apart = sum(int((now[name] != before).sum()) for name, before in self.base.items())
        return apart / sum(one.numel() for one in self.base.values())


def Turns(way: Way):
    """A callback that reports each step, and waits for the turn of the next one."""
    from transformers import TrainerCallback

    class Waits(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            print(TURN + json.dumps({"step_seconds": time.perf_counter() - self.began, **way.costs}), flush=True)

    return Waits()


def child(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        way = Way(options, folder)
        way.trainer.train()
        print(TURN + json.dumps({"changed": way.changed()}), flush=True)


# ---- all ways --------------------------------------------------------------------------------------------


class CostTurn:
    """A process of one way."""

    def __init__(self, name: str, options: argparse.Namespace, log: Path) -> None:
        given = ["--model", options.model, "--dtype", options.dtype, "--answers", options.answers]
        given += ["--tokens", options.tokens, "--steps", options.steps]
        command = [sys.executable, __file__, "--child", name, *given]
        self.name, self.log = name, log
        self.process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"),
            text=True, env={**os.environ, **VARIABLES},
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Let it do one step."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and reading says why
        return self.read()

    def read(self) -> dict[str, float]:
        """Read what it reports next.

        Raises:
            RuntimeError: It has ended.
        """
        for line in self.process.stdout:
            if line.startswith(TURN):
                return json.loads(line.removeprefix(TURN))
        raise RuntimeError(f"{self.name} has ended: {self.log.read_text()[-3000:]}")


def measure(options: argparse.Namespace, root: Path) -> dict[str, dict[str, Any]]:
    turns = [CostTurn(name, options, root / f"{name}.log") for name in options.ways]
    steps: dict[str, list[dict[str, float]]] = {turn.name: [] for turn in turns}
    order = random.Random(0)
    try:
        for number in range(WARMUP + options.steps):
            for turn in order.sample(turns, len(turns)):
                found = turn.step()
                if number >= WARMUP:
                    steps[turn.name].append(found)
        return {turn.name: summary(steps[turn.name], turn.read()) for turn in turns}
    finally:
        for turn in turns:
            turn.process.kill()


def summary(steps: list[dict[str, float]], end: dict[str, Any]) -> dict[str, Any]:
    middle = {name: statistics.median(step[name] for step in steps) for name in ("step_seconds", "sync_seconds")}
    speed = statistics.median(step["tokens"] / step["rollout_seconds"] for step in steps)
    return {**middle, "bytes": steps[-1]["bytes"], "tokens_per_second": speed, **end, "steps": steps}


def show(dtype: str, results: dict[str, dict[str, Any]]) -> None:
    print(f"\n{dtype:16s}{'MB a sync':>12}{'ms a sync':>12}{'tokens/s':>12}{'s a step':>12}{'changed':>12}")
    for name, one in results.items():
        changed = "" if one["changed"] is None else f"{one['changed']:.2%}"
        print(
            f"{name:16s}{one['bytes'] / 1e6:>12.1f}{1000 * one['sync_seconds']:>12.0f}{one['tokens_per_second']:>12.1f}"
            f"{one['step_seconds']:>12.2f}{changed:>12}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--answers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    results = {}
    with tempfile.TemporaryDirectory() as root:
        if not options.model:
            options.model = str(write_base(Path(root) / "base", "float32"))
        for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
            results[dtype] = measure(argparse.Namespace(**{**vars(options), "dtype": dtype}), Path(root))
            show(dtype, results[dtype])
    save(RESULTS, {**{name: getattr(options, name) for name in ("answers", "tokens", "steps")}, "results": results})


if __name__ == "__main__":
    main()
