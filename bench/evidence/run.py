"""Train all rows of evidence.yaml and score them. `make evidence` runs it, and then bench/evidence/report.py.

    python -m bench.evidence.run [--runs DIR] [--near DIR] [--workers 2] [--config FILE] [--only ROW ...] [--limit N]

Each run is one JSON file in the folder. A run whose file exists with the same settings is not run again, so that the
command can be interrupted and started again. A run that fails has a file with its error, and is run again.

Stages: (1) every row on the first task with each learning rate and the first seed; (2) its best learning rate, by the
accuracy on validation questions, with the other seeds; (3) the same rate on the other tasks with all seeds. Rows that
are marked `screened` stop after (1), and `tasks` of a row names its tasks of stage (3). The base is scored without
training. (4) Time and memory of a few updates, one run at a time on all cores, the rows in turn.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from bench.evidence.families import check_frozen
from s2ft.files.writing import replace_file

HERE = Path(__file__).parent
CONFIG = HERE / "evidence.yaml"
BASE = "base"  # the row of the model without training
COSTS = "costs"  # the task of runs that measure time and memory, which run alone
ROUNDS = 2  # of each row
NOT_SETTINGS = ("rates", "rate_of", "tasks", "title", "screened")  # of a row: what no run's numbers depend on


@dataclass(frozen=True)
class Run:
    """One training run of the comparison."""

    row: str
    task: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.row}-{self.rate:g}-{self.seed}"


def settings_of(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """Return everything that a run's numbers depend on."""
    shared = {key: value for key, value in config.items() if key not in ("rows", "tasks", "seeds", "sweep", "steps")}
    entry = {"method": BASE} if run.row == BASE else config["rows"][run.row]
    row = {key: value for key, value in entry.items() if key not in NOT_SETTINGS}
    return {
        **shared,
        **row,
        "steps": config["steps"][run.task],
        "row": run.row,
        "task": run.task,
        "rate": run.rate,
        "seed": run.seed,
    }


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Results:
    """The results of finished runs, by name.

    Args:
        path: A folder with one JSON file for each run, or a file with one line for each run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[dict[str, Any]]:
        """Return the results of all runs that are there and did not fail, in the order of their names."""
        if self.path.is_dir():
            texts = [file.read_text(encoding="utf-8") for file in self.path.glob("*.json")]
        else:
            texts = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        found = [json.loads(text) for text in texts]
        return sorted((one for one in found if "error" not in one), key=lambda one: one["name"])

    def get(self, run: Run, config: dict[str, Any]) -> dict[str, Any] | None:
        """Return the result of a run with these settings, or None."""
        if self.path.is_dir():
            file = self.path / f"{run.name}.json"
            found = [json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
        else:
            found = [one for one in self.all() if one["name"] == run.name]
        wanted = digest(settings_of(run, config))
        return next((one for one in found if one["digest"] == wanted and "error" not in one), None)

    def write(self, result: dict[str, Any]) -> None:
        """Write the result of a run into the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(self.path / f"{result['name']}.json", (json.dumps(result, indent=1) + "\n").encode())


def sweep_runs(config: dict[str, Any], rows: list[str]) -> list[Run]:
    """Return the runs of the first stage, one rate of each row after the other."""
    rates = {row: config["rows"][row].get("rates", []) for row in rows}
    return [
        Run(row, config["sweep"], rates[row][number], config["seeds"][0])
        for number in range(max(map(len, rates.values())))
        for row in rows
        if number < len(rates[row])
    ]


def best_rate(row: str, config: dict[str, Any], results: Results) -> float | None:
    """Return the rate with the best accuracy on the validation questions, or None if a run of the row is missing.

    Of equal ones it is the one with the least forgetting.
    """
    found = []
    entry = config["rows"][row]
    if "rate_of" in entry:  # the same computation in another dtype
        return best_rate(entry["rate_of"], config, results)
    for rate in entry["rates"]:
        result = results.get(Run(row, config["sweep"], rate, config["seeds"][0]), config)
        if result is None:
            return None
        found.append((-result["validation"], result["forgetting"]["encyclopedia"], rate))
    return min(found)[2]


def base_runs(config: dict[str, Any]) -> list[Run]:
    """Return the runs that score the base."""
    return [Run(BASE, task, 0.0, config["seeds"][0]) for task in config["tasks"]]


def later_runs(config: dict[str, Any], rows: list[str], results: Results) -> list[Run]:
    """Return the runs of the second and third stage of all rows whose first stage is complete."""
    kept = [row for row in rows if not config["rows"][row].get("screened")]
    rates = {row: rate for row in kept if (rate := best_rate(row, config, results)) is not None}
    sweep, others = config["sweep"], [task for task in config["tasks"] if task != config["sweep"]]
    seeds = [Run(row, sweep, rate, seed) for seed in config["seeds"] for row, rate in rates.items()]
    wanted = {row: config["rows"][row].get("tasks", others) for row in rates}
    tasks = [Run(row, task, rates[row], seed) for row in rates for task in wanted[row] for seed in config["seeds"]]
    return [*seeds, *base_runs(config), *tasks]


def cost_runs(config: dict[str, Any], rows: list[str]) -> list[Run]:
    """Return the runs that measure time and memory."""
    kept = [row for row in rows if not config["rows"][row].get("screened")]
    return [Run(row, COSTS, 1e-4, number) for number in range(ROUNDS) for row in kept]


def run_all(
    config: dict[str, Any], rows: list[str], results: Results, near: str | None, workers: int, limit: float
) -> bool:
    """Run what is missing. Returns False if the time limit or a failure leaves a run out."""
    end, failed, complete = time.monotonic() + limit, [], True
    stages = [
        (workers, 1, lambda: sweep_runs(config, rows)),
        (workers, 1, lambda: later_runs(config, rows, results)),
        (1, os.cpu_count(), lambda: cost_runs(config, rows)),
    ]
    for processes, threads, stage in stages:
        todo = [run for run in dict.fromkeys(stage()) if results.get(run, config) is None]
        print(f"{len(todo)} runs to do", flush=True)
        if not todo or time.monotonic() > end:
            complete = complete and not todo
            continue
        start, with_config = get_context("spawn"), (config, near, threads)
        with ProcessPoolExecutor(processes, mp_context=start, initializer=_start_worker, initargs=with_config) as pool:
            waiting: dict[Any, Run] = {}
            while waiting or (todo and time.monotonic() < end):
                while todo and len(waiting) < processes and time.monotonic() < end:
                    run = todo.pop(0)
                    waiting[pool.submit(_run, run, settings_of(run, config))] = run
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    result = _write(results, waiting.pop(future), future, config)
                    failed += [result["name"]] if "error" in result else []
        complete = complete and not todo
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return complete and not failed


def _write(results: Results, run: Run, future: Any, config: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(run, config)
    head = {"name": run.name, "digest": digest(settings), "settings": settings}
    try:
        result = {**head, **future.result()}
        line = (
            f"{result['seconds_per_step']:.2f} s a step"
            if run.task == COSTS
            else (
                f"validation {result['validation']:.1%}, test {result['test']:.1%}, forgetting "
                f"{result['forgetting']['encyclopedia']:.3f}, KL {result['kl']:.3f}, {result['seconds']:.0f} s"
            )
        )
    except Exception as error:
        result = {**head, "error": f"{type(error).__name__}: {error}"}
        line = result["error"]
    results.write(result)
    print(f"{time.strftime('%H:%M:%S')} {run.name}: {line}", flush=True)
    return result


def _start_worker(config: dict[str, Any], near: str | None, threads: int) -> None:
    """Load the model once in a worker. Side by side, workers have one thread each, so as not to disturb each other."""
    import torch

    torch.set_num_threads(threads)
    from bench.evidence import work

    work.start(config, near)


def _run(run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    from bench.evidence import work

    return work.run(run.task, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=".evidence", help="folder of the runs (default: %(default)s)")
    parser.add_argument("--near", help="folder with MultiArith.test.jsonl, AddSub.test.jsonl and SingleEq.test.jsonl")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread (default: cores)")
    parser.add_argument("--config", default=str(CONFIG), help="what is compared (default: evidence.yaml)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="run only these rows")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no run after so many seconds")
    arguments = parser.parse_args()
    check_frozen()
    config = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
    rows = arguments.only or list(config["rows"])
    unknown = sorted(set(rows) - set(config["rows"]))
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: {arguments.config} has the rows {', '.join(config['rows'])}")
    results = Results(Path(arguments.runs))
    if not run_all(config, rows, results, arguments.near, arguments.workers, arguments.limit):
        raise SystemExit("not all runs are done: start the command again")


if __name__ == "__main__":
    main()
