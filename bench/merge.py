"""Memory and time of `s2ft merge`, by default of a checkpoint of 2 GB in bfloat16 whose largest tensor has 34 MB.

    python bench/merge.py [--layers 16] [--width 2048] [--channels 8192] [--folder DIR]

"from disk" reads, changes and writes one weight at a time. "in memory" loads the model, as s2ft merge does with a base
that it can't read so. Each runs in a process of its own and merges a tiny model first, so that everything is imported.
Memory is the peak of the process's resident memory beyond what it had then. The files of both must be equal.
"""

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.memory import PeakMemory
from harness import fill_slices, save

RESULTS = Path(__file__).parent / "results" / "merge.json"
WAYS = ("from disk", "in memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--channels", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=0, help="experts of each layer; default: a dense model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written; default: the system's own")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make is not None:
        make(args.make, args)
        return
    if args.way is not None:
        print(json.dumps(measure(args.way, args.folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        compare(Path(folder), args)


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Run both ways in processes of their own, print the results and save them."""
    shape = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "channels", "experts")]
    run([*shape, f"--make={folder / 'large'}"])
    run(["--layers=1", "--width=64", "--channels=64", f"--experts={args.experts}", f"--make={folder / 'tiny'}"])
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            runs[way].append(json.loads(run([f"--way={way}", f"--folder={folder}"]).splitlines()[-1]))
        files = ["model.safetensors", "config.json"]
        different = filecmp.cmpfiles(*(folder / way for way in WAYS), files, shallow=False)
        if different[1] or different[2]:
            raise SystemExit(f"the two ways wrote different files: {different[1] + different[2]}")
    stored = stored_bytes(folder / "large/base/model.safetensors")
    total, largest = sum(stored), max(stored)
    print(f"checkpoint of {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.1f} MB; files equal")
    for way in WAYS:
        peak = max(run["bytes"] for run in runs[way])
        seconds, busy = (min(run[key] for run in runs[way]) for key in ("seconds", "processor seconds"))
        memory = f"{peak / 1e6:>10.1f} MB = {peak / largest:.2f} × the largest tensor"
        print(f"{way:<10}{seconds:>8.1f} s, processor {busy:.1f} s{memory}")
    save(RESULTS, {"bytes": total, "largest": largest, "runs": runs})


def run(options: list[str]) -> str:
    return subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout


def stored_bytes(file: Path) -> list[int]:
    """Sizes of the tensors of a safetensors file."""
    from s2ft.files.reading import stored_tensors

    return [stored.bytes for stored in stored_tensors(file).values()]


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write a random model, its tokenizer and a random adapter."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    import s2ft

    shape = {
        "num_hidden_layers": args.layers,
        "hidden_size": args.width,
        "intermediate_size": args.channels,
        "num_attention_heads": 32,
        "vocab_size": 4096,
        "dtype": "bfloat16",
    }
    torch.manual_seed(0)
    if args.experts:
        model = MixtralForCausalLM._from_config(MixtralConfig(**shape, num_local_experts=args.experts))
    else:
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape))
    model.save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "base")
    s2ft.attach(model, s2ft.S2FTConfig(o_ratio=0.03, d_ratio=0.03))
    fill_slices(model, std=0.01)
    s2ft.save_adapter(model, folder / "adapter")


def measure(way: str, folder: Path) -> dict[str, float]:
    """Merge the tiny model, then the large one. Returns times, and the peak of memory beyond that before."""
    import transformers

    from s2ft.conversion import merged
    from s2ft.model.checkpoint import CannotStream

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if way == "in memory":

        def refuse(*_):
            raise CannotStream("the benchmark asks for it")

        merged.model_on_disk = refuse
    for name in ("tiny", "large"):
        output = folder / way
        if output.exists():
            subprocess.run(["rm", "-r", output], check=True)
        memory = PeakMemory("cpu")
        memory.forget_peak()
        begin, of_process = time.perf_counter(), time.process_time()
        merged.export(str(folder / name / "base"), folder / name / "adapter", output)
        seconds, of_process = time.perf_counter() - begin, time.process_time() - of_process
    return {"seconds": seconds, "processor seconds": of_process, "bytes": memory.peak()}


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
