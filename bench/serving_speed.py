"""The HTTP server with many adapters under load: tokens a second and latencies by the number of clients.

    python bench/serving_speed.py [--model FOLDER_OR_GGUF] [--adapters 16] [--clients 1 8 32] [--tokens 32] [--rounds 3]

The adapters are those of bench/mixed_batches.py: random, with d_ratio 0.03 of every down_proj, saved on disk. The
server runs as a process of its own with `s2ft serve`. Each client sends its requests one after the other, for greedy
answers of equal length. There are three loads: all requests for the base, each for a random adapter, and the same with
sampling (top_p, top_k). The loads take turns. The report also has the seconds that the start takes for the adapters'
checks.
"""

import argparse
import asyncio
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from harness import save
from mixed_batches import BEGINNINGS, write_adapters

from s2ft.serve.server import adapters_of
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

RESULTS = Path(__file__).parent / "results" / "serve.json"
GREEDY = dict(temperature=0)
SAMPLING = dict(temperature=0.8, top_p=0.95, top_k=50)
REQUESTS = 4  # of each client in a round


async def load(url: str, clients: int, tokens: int, names: list[str], sampling: dict, seed: int) -> dict:
    """Send the requests of all clients. Returns tokens a second and the seconds of each request."""
    draw, seconds = random.Random(seed), []

    async def client(http: httpx.AsyncClient) -> None:
        for _ in range(REQUESTS):
            body = dict(model=draw.choice(names), prompt=draw.choice(BEGINNINGS), max_tokens=tokens, **sampling)
            start = time.perf_counter()
            answer = (await http.post(f"{url}/v1/completions", json=body)).raise_for_status().json()
            seconds.append(time.perf_counter() - start)
            generated.append(answer["usage"]["completion_tokens"])

    generated: list[int] = []
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        total = time.perf_counter() - start
    return {"tokens_per_second": sum(generated) / total, "seconds": seconds}


def start_server(model: str, folder: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start `s2ft serve` on a free port. Returns the process and its address."""
    command = [sys.executable, "-m", "s2ft", "serve", "--model", model, "--adapters", folder, "--port", "0"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--served-model-name", "base", "--dtype", "float32", "--max-batch-size", "32"], stderr=file
        )
    while True:
        found = re.search("serving on (http://.*)", log.read_text())
        if found:
            return process, found[1].strip()
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")
        time.sleep(0.1)


def seconds_of_checks(model, folder: str) -> float:
    """Seconds that the checks of all adapters take at the start, with the fingerprint of the base."""
    start = time.perf_counter()
    names = adapters_of(model, "base", folder).names
    assert names
    return time.perf_counter() - start


def measure(url: str, names: list[str], job: argparse.Namespace) -> dict:
    """Measure all loads in turns, and return the medians over the rounds."""
    loads = {"base": (["base"], GREEDY), "adapters": (names, GREEDY), "adapters, sampled": (names, SAMPLING)}
    found: dict[str, list[dict]] = {}
    for name in (*names, "base"):  # adapters are read at their first use
        asyncio.run(load(url, 1, 4, [name], GREEDY, 0))
    for number in range(job.rounds):
        for clients in job.clients:
            for name, (models, sampling) in loads.items():
                one = asyncio.run(load(url, clients, job.tokens, models, sampling, number))
                found.setdefault(f"{name}, {clients} clients", []).append(one)
    return {name: summary(rounds) for name, rounds in found.items()}


def summary(rounds: list[dict]) -> dict:
    """Median of the rounds' tokens a second, and quantiles of the seconds of all requests."""
    seconds = sorted(value for one in rounds for value in one["seconds"])
    return {
        "tokens_per_second": statistics.median(one["tokens_per_second"] for one in rounds),
        "median_seconds": statistics.median(seconds),
        "seconds_of_95_percent": seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a checkpoint folder or a .gguf file")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    job = parser.parse_args()
    name = job.model or default_model()
    with tempfile.TemporaryDirectory() as folder:
        model, _ = load_model(name, "float32")
        names = write_adapters(model, job.adapters, f"{folder}/adapters")
        checks = seconds_of_checks(model, f"{folder}/adapters")
        del model
        process, url = start_server(name, f"{folder}/adapters", Path(folder) / "log")
        try:
            results = measure(url, names, job)
        finally:
            process.terminate()
            process.wait()
    for load_name, one in results.items():
        print(
            f"{load_name:<32}{one['tokens_per_second']:8.1f} tokens/s{one['median_seconds']:8.2f} s median"
            f"{one['seconds_of_95_percent']:8.2f} s for 95 %"
        )
    print(f"checks of {job.adapters} adapters at the start: {checks:.2f} s")
    save(RESULTS, {"options": vars(job), "results": results, "seconds_of_checks": checks})


if __name__ == "__main__":
    main()
