"""s2ft compare: S²FT, LoRA and others, trained on the same rows and measured on the same held-out rows.

Each run has a process of its own, so that the peak of its memory is its own. A finished run is a line of runs.jsonl.
"""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from s2ft.attached.learning_rate import suggested_rate, weight_size, width_of
from s2ft.config import refuse
from s2ft.files.plain_text import replace_file, table
from s2ft.model.coupling import by_key, projections_of
from s2ft.model.registry import couplings_of
from s2ft.packages import check_packages
from s2ft.text.divergence import mean_loss
from s2ft.text.evaluation import answer_lines, compare, evaluate
from s2ft.train.batching import updates_of
from s2ft.train.contents import hash_of_base, hash_of_rows
from s2ft.train.device import explain_out_of_memory, peak_memory
from s2ft.train.options import CompareOptions, check_ratios
from s2ft.train.output import LOCK, only_run_in, write_json
from s2ft.train.parallel import devices_of
from s2ft.train.run import Run, load, meter_of, other_text, smaller_step
from s2ft.train.tuners import TARGETS, TUNERS, check_tuner, default_rate, prepare, train_rows

logger = logging.getLogger(__name__)
RUNS, REPORT = "runs.jsonl", "compare.json"
OF_COMMAND = ("output_dir", "overwrite", "methods", "rates", "seeds", "one_run", "hub_token")  # no run depends on them
REFUSED = ("resume_from_checkpoint", "on_top", "init_adapter", "protect", "push_to_hub", "load_best_model_at_end",
           "stop_after", "kernels", "early_stopping_patience", "stop_at_forgetting", "stop_at_kl")  # fmt: skip
OF_PEFT = {"lora_r": "r", "lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters",
           "lora_modules_to_save": "modules_to_save",
           **{name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}}  # fmt: skip # by TRL's
SHOWN = 2  # answers side by side
# What all runs of a comparison read, by its key in the contents of a line of runs.jsonl.
READ = {
    "rows": "the training rows",
    "held_out": "the held-out rows",
    "forgetting_data": "the text of --forgetting-data",
    "model": "the files of the model",
}


# What is measured, by its key in a line of runs.jsonl: the heading of its column, and the format of its values.
MEASURES = {
    "loss_after": ("loss", ".4f"),
    "accuracy": ("right", ".1%"),
    "forgetting": ("forgetting", ".4f"),
    "base_kl": ("KL from the base", ".4f"),
    "seconds_per_step": ("s a step", ".2f"),
    "peak_mib": ("peak MiB", ",.0f"),
    "trained": ("trained", ",.0f"),
}
MORE_IS_BETTER, NEITHER = "accuracy", "trained"  # of all others less is better


def compare_tuners(run: Run, words: Sequence[str]) -> None:
    """Make all runs that have no result yet, and print and write the comparison.

    Args:
        run: The options of the command, as those of s2ft sft.
        words: Its command line, which the process of each run has too.

    Raises:
        ValueError: A method is unknown, an option can't be compared, there are no held-out rows, or the output folder
            holds something else.
        FileExistsError: Another process uses the output folder.
        SystemExit: A run has failed, and its process has said why.
    """
    options = CompareOptions(
        **{one.name: run.given[one.name] for one in fields(CompareOptions) if one.name in run.given}
    )
    folder, settings = run.folder.path, {key: value for key, value in run.given.items() if key not in OF_COMMAND}
    if options.one_run:
        method, rate, seed = options.one_run
        line = {"method": method, "multiple": float(rate), "seed": int(seed), "settings": settings}
        line["contents"] = contents_of(run)
        with explain_out_of_memory(smaller_step(run.arguments)):
            line |= measure(run, method, float(rate), int(seed))
        earlier = (folder / RUNS).read_bytes() if (folder / RUNS).exists() else b""
        replace_file(folder / RUNS, earlier + (json.dumps(line, ensure_ascii=False) + "\n").encode())
        return
    check(run, options)
    wanted = [(method, rate, seed) for seed, method, rate in product(options.seeds, options.methods, options.rates)]
    contents = contents_of(run)
    with only_run_in(folder):
        if run.options.overwrite:
            (folder / RUNS).unlink(missing_ok=True)
        earlier, done = runs_in(folder, settings), finished(folder, settings, contents)
        warn_of_changes(
            folder, [line for line in earlier if key_of(line) in wanted and key_of(line) not in done], contents
        )
        for number, (method, rate, seed) in enumerate(wanted, 1):
            if (method, rate, seed) not in finished(folder, settings, contents):
                logger.info(
                    "run %d of %d: %s, rate × %g, seed %d", number, len(wanted), TUNERS[method].title, rate, seed
                )
                status = own_process([*words, "--one-run", method, str(rate), str(seed)])
                if status:
                    raise SystemExit(status)
        done = finished(folder, settings, contents)
        if not done.keys() >= set(wanted):
            raise ValueError(
                f"{', '.join(READ.values())}: one of these changed during the runs; start the command again"
            )
        lines = [done[key] for key in wanted]
        best = {method: best_rate([line for line in lines if line["method"] == method]) for method in options.methods}
        print(report(lines, best))
        write_json(folder / REPORT, {"settings": settings, "best": best, "runs": lines})


def check(run: Run, options: CompareOptions) -> None:
    """Check everything that can be checked without the model. Raises as :func:`compare_tuners`."""
    folder, arguments = run.folder.path, run.arguments
    for method in options.methods:
        check_tuner(method)
        check_packages("s2ft.peft" if TUNERS[method].config else "")
    alone = devices_of(arguments).count == 1 and not arguments.fsdp and not arguments.deepspeed
    others = (
        folder.is_dir() and {path.name for path in folder.iterdir()} - {"logs", LOCK} and not (folder / RUNS).is_file()
    )
    refuse(
        *((run.given.get(name), f"{name} is an option of s2ft sft that s2ft compare does not have: leave it out")
          for name in REFUSED),
        (not alone, "s2ft compare runs on one device: start it without torchrun, accelerate, fsdp and deepspeed"),
        (run.model.keep_packed, "PEFT has no methods for the blocks of a .gguf file: leave out --keep-packed"),
        ("full" in options.methods and run.model.quantized, "weights in 4 or 8 bit can't be trained in full: leave "
         "out the method full, or the quantization"),
        (others, f"output folder {folder} isn't empty and holds no comparison: choose another"),
    )  # fmt: skip
    if "learning_rate" in run.given:
        logger.info("learning_rate is not used: each method has a start rate of its own, and --rates multiplies it")
    if run.method.read(run)[1] is None:
        raise ValueError(
            "s2ft compare needs held-out rows: give eval_data or test_split_size, or 100 rows or more, of which a "
            "twentieth is held out"
        )


def own_process(words: Sequence[str]) -> int:
    """Run the command with other words in a process of its own, and return its exit status."""
    return subprocess.run([sys.executable, "-m", "s2ft", "compare", *words]).returncode


def contents_of(run: Run) -> dict[str, str | None]:
    """Return the hashes of what all runs of a comparison read, by the keys of :data:`READ`."""
    rows, held_out = run.method.read(run)
    other = other_text(run)[0]
    in_loading = getattr(run.arguments, "model_init_kwargs", None) or {}
    return {
        "rows": hash_of_rows(rows),
        "held_out": hash_of_rows(held_out),
        "forgetting_data": None if other is None else hash_of_rows(other),
        "model": hash_of_base(run.model.model_name_or_path, in_loading.get("revision", run.model.model_revision)),
    }


def runs_in(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of all runs with these settings, whatever the files held that they read."""
    file = folder / RUNS
    if not file.exists():
        return []
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["settings"] == settings]


def finished(folder: Path, settings: dict[str, Any], contents: dict[str, str | None]) -> dict[tuple, dict[str, Any]]:
    """Return the lines of runs with these settings that read the same contents, by method, rate and seed."""
    lines = [line for line in runs_in(folder, settings) if line.get("contents") == contents]
    return {key_of(line): line for line in lines}


def key_of(line: dict[str, Any]) -> tuple[str, float, int]:
    """Return the method, the rate and the seed of a run."""
    return line["method"], line["multiple"], line["seed"]


def warn_of_changes(folder: Path, lines: list[dict[str, Any]], contents: dict[str, str | None]) -> None:
    """Log which runs are made again, because what they read has changed.

    Args:
        folder: The output folder.
        lines: Their lines in the folder.
        contents: What is read now.
    """
    if not lines:
        return
    recorded = [line.get("contents", {}) for line in lines]
    changed = [name for key, name in READ.items() if any(one.get(key) != contents[key] for one in recorded)]
    count = f"{len(lines)} run{'s' * (len(lines) != 1)}"
    logger.warning("%s in %s read other data and will be made again: %s changed", count, folder, " and ".join(changed))


# ---- one run ---------------------------------------------------------------------------------------------------


def measure(run: Run, method: str, multiple: float, seed: int) -> dict[str, Any]:
    """Train the model of a run by a method, and return what was measured.

    The rows that are held out do not depend on the seed.

    Args:
        run: The options.
        method: A name of :data:`~s2ft.train.tuners.TUNERS`.
        multiple: The learning rate, as a multiple of the method's start rate.
        seed: Seed of the order of the rows and of the method's random choices.
    """
    other = other_text(run)[0]
    check_ratios(run.config, run.given)
    run, model, tokenizer, data = load(replace(run, config=replace(run.config, seed=seed)))
    arguments, rows, size = run.arguments, data.held_out.rows, run.arguments.per_device_train_batch_size
    arguments.output_dir = str(run.folder.path / "logs" / f"{method}-{multiple:g}-{seed}")
    arguments.seed = arguments.data_seed = seed
    arguments.save_strategy = arguments.eval_strategy = "no"
    if getattr(model, "hf_quantizer", None) is None:
        model.to(arguments.device)
    before = mean_loss(model, rows, size) if method == "full" else None  # its base is lost
    if method == "full" and model.dtype == torch.bfloat16:  # rounding to bfloat16 would lose the updates
        model.float()
        arguments.bf16, arguments.mixed_precision = True, "bf16"
    of_weights = 0.0 if method == "s2ft" else weight_size(model, projections_of(couplings_of(model)))
    chosen = run.config.to_dict() if method == "s2ft" else options_of_peft(run, method, model)
    calibration = run.method.calibration(run, tokenizer, data) if method == "s2ft" else None
    prepared = prepare(model, method, chosen, seed=seed, calibration=calibration)
    rate = (
        suggested_rate(prepared.model, updates_of(arguments, data.rows))
        if method == "s2ft"
        else default_rate(method, width_of(model), of_weights)
    )
    arguments.learning_rate = rate * multiple
    if run.forgetting.measures:  # at the end alone
        run = replace(run, forgetting=replace(run.forgetting, meter_steps=1 << 30))
    meter = meter_of(run, other, prepared.model, tokenizer, data)
    trained = train_rows(
        prepared, tokenizer, data.rows, arguments, callbacks=[meter] if meter else [], options=run.options
    )
    peak = peak_memory()
    how = (data.held_out.examples, data.held_out.task, size, data.held_out.max_new_tokens)
    scored = evaluate(prepared.model, tokenizer, *how, prompt=data.prompt) if data.held_out.task else None
    found = compare(prepared.model, tokenizer, rows, most=len(rows), samples=SHOWN, batch_size=size).to_dict()
    return {
        **found,
        "loss_before": found["loss_before"] if before is None else before,
        "rate": arguments.learning_rate,
        "trained": prepared.trainable,
        "updates": trained.updates,
        "seconds_per_step": trained.seconds_per_step,
        "peak_mib": peak / 2**20,
        **({"accuracy": scored.accuracy} if scored else {}),
        **(meter.measured[max(meter.measured)].to_dict() if meter else {}),
    }


def options_of_peft(run: Run, method: str, model) -> dict[str, Any]:
    """Return the options of a method of PEFT: TRL's for LoRA, and layers that the model has."""
    if TUNERS[method].config is None:
        return {}
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = {} if set(TARGETS) <= names else {"target_modules": "all-linear"}
    if TUNERS[method].config == "LoraConfig":
        found |= {theirs: run.given[ours] for ours, theirs in OF_PEFT.items() if run.given.get(ours) is not None}
        if found.get("target_modules") == ["all-linear"]:
            found["target_modules"] = "all-linear"
        found.setdefault("lora_alpha", 2 * found.get("r", TUNERS[method].defaults["r"]))
    return found


# ---- what is printed --------------------------------------------------------------------------------------------


def best_rate(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what one method reached at the rate with the smallest loss, as means over the seeds.

    Args:
        lines: The lines of the method's runs.

    Returns:
        The means by the names of :data:`MEASURES`, the least and the largest of each under `ranges`, the rate, and its
        place among the rates under `edge`: "smallest", "largest" or "". Under `losses` the mean loss at each rate.
    """
    rates = by_key((line["rate"], line) for line in lines)
    means = {rate: fmean(line["loss_after"] for line in rates[rate]) for rate in sorted(rates)}
    best = min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
    ends = {min(rates): "smallest", max(rates): "largest"} if len(rates) > 1 else {}
    own = rates[best]
    values = {name: [line[name] for line in own] for name in MEASURES if name in own[0]}
    ranges = {name: (min(found), max(found)) for name, found in values.items()}
    found = {"rate": best, "edge": ends.get(best, ""), "losses": means, "seeds": len(own), "ranges": ranges}
    return {**found, "samples": own[0]["samples"], **{name: fmean(each) for name, each in values.items()}}


def report(lines: list[dict[str, Any]], best: dict[str, dict[str, Any]]) -> str:
    """Return the comparison as text: a table, losses by rate, what is better and by how much, doubts, and answers.

    Args:
        lines: The lines of all runs.
        best: What each method reached, as :func:`best_rate` returns it.
    """
    names = {method: TUNERS[method].title for method in best}
    first, *others = best
    kinds = [name for name in MEASURES if name in best[first]]
    rows = [["method", "best rate", *(MEASURES[name][0] for name in kinds)]]
    for method, one in best.items():
        halves = {name: (high - low) / 2 for name, (low, high) in one["ranges"].items()}
        spread = [f" ±{shown(name, halves[name])}" if halves[name] else "" for name in kinds]
        cells = [shown(name, one[name]) + more for name, more in zip(kinds, spread)]
        rows.append([names[method], f"{one['rate']:.2g}", *cells])
    before = f"{lines[0]['loss_before']:.4f} before training, on {lines[0]['rows']} held-out rows"
    text = [f"\nloss {before}; {lines[0]['updates']} updates\n", table(rows, right=range(1, len(rows[0]))), ""]
    for method, one in best.items():
        losses = ", ".join(f"{loss:.4f} at {rate:.2g}" for rate, loss in one["losses"].items())
        text.append(f"{names[method]} by rate: loss {losses}")
    for other in others:
        text += ["", f"{names[first]} against {names[other]}:"]
        text += [f"  {difference(name, best, first, other)}" for name in kinds if name != NEITHER]
    notes = [f"the best rate of {names[method]} is the {one['edge']} that was tried: widen --rates"
             for method, one in best.items() if one["edge"]]  # fmt: skip
    if best[first]["seeds"] == 1:
        notes.append("one seed: small differences may be chance; --seeds 0 1 2 shows how much runs differ")
    text += ["", *notes] if notes else []
    for number, asked in enumerate(best[first]["samples"]):
        answers = {method: one["samples"][number] for method, one in best.items()}
        base = next((answer["base"] for answer in answers.values() if answer["base"] is not None), None)
        tuned = {names[method]: answer["tuned"] for method, answer in answers.items()}
        text += answer_lines(asked["prompt"], right=asked["right"], base=base, **tuned)
    return "\n".join(text)


def difference(name: str, best: dict[str, dict[str, Any]], first: str, other: str) -> str:
    """Return in words which of two methods is better in one quantity, and by how much."""
    ours, theirs, (title, _) = best[first], best[other], MEASURES[name]
    gap = ours[name] - theirs[name]
    low, high = sorted((ours["ranges"][name], theirs["ranges"][name]))
    if not low[1] < high[0]:  # the ranges of the seeds overlap
        return f"{title}: no clear difference"
    winner = first if (gap > 0) == (name == MORE_IS_BETTER) else other
    return f"{title}: {TUNERS[winner].title} is better by {shown(name, abs(gap))}"


def shown(name: str, value: float) -> str:
    """Return a value of :data:`MEASURES` as text."""
    return format(value, MEASURES[name][1])
