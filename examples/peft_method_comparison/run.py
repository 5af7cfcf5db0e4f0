"""PEFT's method comparison on MetaMathQA and GSM8K, with S²FT: one experiment, or a suite of models and methods.

    python examples/peft_method_comparison/run.py experiments/s2ft/llama-3.2-3B-d106-lr_0.0003
    python examples/peft_method_comparison/run.py --models Qwen/Qwen2.5-0.5B meta-llama/Llama-3.2-3B

README.md describes the protocol, the files and the options.
"""

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.time()
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

CHANGES = {  # options that change a training parameter: its name and type
    "model": ("model_id", str),
    "steps": ("max_steps", int),
    "eval-steps": ("eval_steps", int),
    "batch-size": ("batch_size", int),
    "eval-batch-size": ("batch_size_eval", int),
    "dtype": ("dtype", str),
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("experiments", nargs="*", type=Path, help="folders experiments/METHOD/NAME")
    suite = made.add_argument_group("suite")
    suite.add_argument("--models", nargs="+", help="models to compare the methods on")
    suite.add_argument("--methods", nargs="+", help="names of suite.json; default: all")
    suite.add_argument("--rates", nargs="+", type=float, help="learning rates of all methods; default: suite.json's")
    suite.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds; default: 0")
    suite.add_argument("--parameters", type=int, help="trained parameters; default: as LoRA r=32 on q_proj and v_proj")
    suite.add_argument("--weight-decay", type=float, help="weight decay; default: 0.1")
    suite.add_argument("--variants", type=Path, default=HERE / "suite.json", help="another suite.json")
    made.add_argument("--data", type=Path, help="folder with the data; default: from the hub")
    made.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    made.add_argument("--time-limit", type=float, metavar="MINUTES", help="stop before; the next call goes on")
    made.add_argument("--test-rows", type=int, help="number of test problems; default: all 1,319")
    made.add_argument("--in-process", action="store_true", help="run in this process: for debugging")
    made.add_argument("--estimate", action="store_true", help="print the expected memory and time, and run nothing")
    made.add_argument("--table", action="store_true", help="print the tables of what has a result, and run nothing")
    made.add_argument(
        "--units", type=json.loads, metavar="JSON", help="choose an experiment's units by these fields of S2FTConfig"
    )
    made.add_argument("--save-data", type=Path, metavar="DIR", help="save the data for a machine without a network")
    made.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # one run of a suite, in a process of its own
    made.add_argument("--until", type=float, help=argparse.SUPPRESS)  # its time limit, as time.time()
    for option, (name, kind) in CHANGES.items():
        made.add_argument(f"--{option}", dest=name, type=kind, help=f"{name} of the training parameters")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run what the options say.

    Returns:
        0 if all runs are done, 3 if the time limit left some, 1 if one failed, 2 for a wrong option.
    """
    made = parser()
    options = made.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    _check(made, options)
    if options.time_limit is not None:
        options.until = STARTED + 60 * options.time_limit
    changes = {name: value for name, _ in CHANGES.values() if (value := getattr(options, name)) is not None}
    try:
        return _run(options, changes)
    except (ValueError, FileNotFoundError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2


def _check(made: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    given = [bool(options.experiments), bool(options.models), options.save_data is not None, options.run is not None]
    if sum(given) != 1:
        made.error("give either experiments' folders, or --models, or --save-data")
    if options.data is not None and not options.data.is_dir():
        made.error(f"--data must be a folder, got {options.data}")
    if options.units is not None and not (options.experiments and isinstance(options.units, dict)):
        made.error('--units goes with an experiment\'s folder, and is JSON such as {"d_ratio": 0.013}')
    for name in ("time_limit", "test_rows", "parameters"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            made.error(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if not options.models and (options.methods or options.rates or options.parameters):
        made.error("--methods, --rates and --parameters go with --models")


def _run(options: argparse.Namespace, changes: dict[str, Any]) -> int:
    from comparison import data, running, suite, units
    from comparison.settings import Run, read_experiment, training_params
    from comparison.training import BUCKET

    if options.save_data is not None:
        defaults = training_params(changes)
        for file in data.save(options.save_data, (defaults.max_steps + BUCKET) * defaults.batch_size):
            print(file)
        return 0
    if options.run is not None:
        run = Run.from_dict(json.loads(options.run.read_text(encoding="utf-8")))
        content = running.execute(run, options.output, options.data, options.until, options.test_rows)
        return 3 if content is None else 0
    if options.units is not None:
        for folder in options.experiments:
            print(units.write(folder, options.units, changes, options.data))
        return 0
    runs = [read_experiment(folder, changes) for folder in options.experiments] or _suite(options, changes)
    if options.estimate:
        from comparison.estimates import table

        print(table(runs).markdown())
        return 0
    limits = suite.Limits(options.output, options.data, options.test_rows, options.until, not options.in_process)
    complete = options.table or suite.execute_all(runs, limits)
    _show(runs, options.output)
    failed = any(suite.has_failed(run, options.output) for run in runs)
    return 1 if failed else 0 if complete else 3


def _suite(options: argparse.Namespace, changes: dict[str, Any]) -> list:
    from comparison import suite

    variants = suite.read_variants(options.variants)
    unknown = sorted(set(options.methods or ()) - set(variants))
    if unknown:
        raise ValueError(f"methods must be of {', '.join(variants)}, got {', '.join(unknown)}")
    chosen = {name: one for name, one in variants.items() if not options.methods or name in options.methods}
    if options.weight_decay is not None:
        changes = {**changes, "weight_decay": options.weight_decay}
    return suite.runs_of(options.models, chosen, options.rates, options.seeds, options.parameters, changes)


def _show(runs: list, output: Path) -> None:
    """Print the tables, and save them in all forms."""
    from comparison.report import tables

    for table in tables(runs, output):
        if table.rows:
            print(table.text(), end="\n\n")
            table.save(output / "tables")


if __name__ == "__main__":
    raise SystemExit(main())
