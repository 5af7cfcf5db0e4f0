"""Budgets by projection: which share of the trained parameters q, k, v, o, up, gate and down should get.

    python bench/evidence/budgets.py [--budget 3.3M] [--steps 16] [--runs 12] [--output budgets.json]

Source: the study of the projections in the S²FT paper (arXiv 2412.06289), which compares them one at a time; AdaLoRA
(Zhang et al., ICLR 2023, arXiv 2303.10512) shares a budget out by importance. Here the loss on held-out rows of
the task decides, after a short run for each division of the budget: a coordinate search from all parameters in `down`.
A move gives one projection a step more, or takes one from it, and the others share the rest as before. It is kept if
the loss falls. Each run trains at most the budget, at one learning rate, on the same rows in the same order; the units
are drawn at random from one seed. At the end the first and the best division run again from other seeds, because the
difference of single runs may be chance.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import s2ft
from s2ft.model.coupling import projections_of
from s2ft.model.registry import couplings_of
from s2ft.reproduce.methods import prepare
from s2ft.reproduce.training import train
from s2ft.selection.budget import unit_parameters
from s2ft.text.divergence import mean_loss
from s2ft.text.models import load_model
from s2ft.text.prompts import prompt_format
from s2ft.train.arguments import SFTArguments
from s2ft.train.demo import default_model, problem_set, token_rows
from s2ft.train.output import RunFolder

KEYS = ("d", "o", "u", "v", "g", "q", "k")  # in the order of the paper's effects, so that good ones are tried first
STEP = 0.25  # share of the budget that a move gives or takes; half of it in the second round

Shares = tuple[tuple[str, float], ...]  # share of the parameters by projection, in the order of KEYS, sum 1


@dataclass(frozen=True)
class Division:
    """A division of the budget and what it gave.

    Attributes:
        shares: Share of the trained parameters by projection, as they were really trained.
        ratios: Ratios of S2FTConfig that give these units, by option.
        trained: Number of trained parameters.
        loss: Loss on the held-out rows after the run, in nats a token.
        seconds: Time of the run.
        seed: Seed of the units.
    """

    shares: dict[str, float]
    ratios: dict[str, float]
    trained: int
    loss: float
    seconds: float
    seed: int


# A run: config with ratios and budget → (loss on held-out rows, seconds). The model is the base before and afterwards.
Run = Callable[[s2ft.S2FTConfig], tuple[float, float]]


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        divisions: All divisions in the order of their runs, all with the same seed.
        best: The one with the lowest loss.
        checks_of_first: Runs of the first division from other seeds.
        checks_of_best: Runs of the best division from the same other seeds.
    """

    divisions: list[Division]
    best: Division
    checks_of_first: list[Division]
    checks_of_best: list[Division]

    def gain(self) -> tuple[float, float]:
        """Return the mean fall of the loss from the first to the best division over all seeds, and its deviation.

        The deviation is the sample standard deviation of the differences by seed; it is nan for one seed.
        """
        pairs = zip([self.divisions[0], *self.checks_of_first], [self.best, *self.checks_of_best])
        falls = [first.loss - best.loss for first, best in pairs]
        return statistics.mean(falls), statistics.stdev(falls) if len(falls) > 1 else float("nan")


def search(model: nn.Module, run: Run, budget: int, *, runs: int = 12, checks: int = 1, seed: int = 0) -> Search:
    """Search for the division of a budget with the lowest loss, by coordinates.

    Args:
        model: Model without adapters.
        run: Trains with a config and returns the loss.
        budget: Largest number of trained parameters.
        runs: Largest number of runs of the search. There are `2 * checks` more.
        checks: Number of other seeds for the first and the best division.
        seed: Seed of the units.

    Returns:
        All runs.

    Raises:
        ValueError: Not even one projection can be trained within the budget, or there are too few runs.
    """
    if runs < 2:
        raise ValueError(f"runs must be at least 2, the first division and one other, got {runs}")
    limits = _limits(model, budget)
    start = next((((key, 1.0),) for key in limits if limits[key][1] >= 1), None)
    if start is None:
        raise ValueError(f"budget={budget:,} does not fit one projection in whole units of every layer: change it")
    known: dict[Shares, Division] = {start: _divided(model, run, start, budget, seed)}
    best = start
    for step in (STEP, STEP / 2):
        before = None
        while before != best:
            before = best
            for key, change in ((key, change) for key in limits for change in (step, -step)):
                shares = _moved(best, key, change, limits)
                if shares is None or shares in known:
                    continue
                if len(known) == runs:
                    break
                known[shares] = _divided(model, run, shares, budget, seed)
                best = min((best, shares), key=lambda one: known[one].loss)
    again = [_divided(model, run, one, budget, seed + 1 + number) for number in range(checks) for one in (start, best)]
    return Search(list(known.values()), known[best], again[::2], again[1::2])


def _limits(model: nn.Module, budget: int) -> dict[str, tuple[float, float]]:
    """Return the smallest and the largest share of the budget by projection: one unit in every layer, and all units.

    Projections of which one unit in every layer is more than the budget are left out.
    """
    limits: dict[str, tuple[float, float]] = {}
    for projection in projections_of(couplings_of(model)):
        share = unit_parameters(model, projection) / budget
        least, most = limits.get(projection.key, (0.0, 0.0))
        limits[projection.key] = least + share, most + share * projection.count
    return {key: limits[key] for key in KEYS if key in limits and limits[key][0] <= 1}


def _moved(shares: Shares, key: str, change: float, limits: dict[str, tuple[float, float]]) -> Shares | None:
    """Return the shares after one projection has got or lost a step, and the others share the rest as before.

    A share that would be less than one unit a layer becomes 0, or one unit a layer if the move lets it grow.

    Returns:
        The new shares, or None if nothing changes or a projection has too few units for its share.
    """
    rest = {one: share for one, share in shares if one != key}
    now = dict(shares).get(key, 0.0) + change
    if now < limits[key][0]:
        now = limits[key][0] if change > 0 else 0.0
    now = min(now, limits[key][1], 1.0) if rest else 1.0
    while rest:
        scale = (1 - now) / sum(rest.values())
        smallest = min(rest, key=lambda one: rest[one] * scale / limits[one][0])
        if rest[smallest] * scale >= limits[smallest][0] * (1 - 1e-9):
            break
        rest.pop(smallest)
    else:
        now = 1.0
    moved = {key: now, **{one: share * (1 - now) / sum(rest.values()) for one, share in rest.items()}}
    found = tuple((one, round(moved[one], 6)) for one in KEYS if moved.get(one, 0) > 0)
    too_many = any(share > limits[one][1] * (1 + 1e-6) for one, share in found)
    return None if found == shares or too_many else found


def _divided(model: nn.Module, run: Run, shares: Shares, budget: int, seed: int) -> Division:
    """Run one division."""
    config = _config(model, shares, budget, seed)
    selection = s2ft.select(model, config)
    projections = {projection.name: projection for projection in projections_of(couplings_of(model))}
    trained = {key: 0 for key, _ in shares}
    units, all_units = dict(trained), dict(trained)
    for name, chosen in selection.units.items():
        key = projections[name].key
        trained[key] += chosen.numel() * unit_parameters(model, projections[name])
        units[key] += chosen.numel()
        all_units[key] += projections[name].count
    loss, seconds = run(config)
    total = sum(trained.values())
    return Division(
        {key: trained[key] / total for key in trained},
        {f"{key}_ratio": units[key] / all_units[key] for key in trained},
        total,
        loss,
        seconds,
        seed,
    )


def _config(model: nn.Module, shares: Shares, budget: int, seed: int) -> s2ft.S2FTConfig:
    """Return the config that divides a budget so."""
    sizes: dict[str, int] = {}
    for projection in projections_of(couplings_of(model)):
        sizes[projection.key] = sizes.get(projection.key, 0) + unit_parameters(model, projection) * projection.count
    ratios = {f"{key}_ratio": min(1.0, share * budget / sizes[key] * (1 + 1e-5)) for key, share in shares}
    return s2ft.S2FTConfig(budget=budget, seed=seed, **ratios)


# ---- a run -----------------------------------------------------------------------------------------------


def short_run(model: nn.Module, tokenizer: Any, rows: Any, held_out: Any, arguments: Any) -> Run:
    """Return a function that trains a division and measures the loss on held-out rows.

    Args:
        model: Model without adapters. After each run it has its base again, bit for bit.
        tokenizer: The model's tokenizer.
        rows: Token rows to train on.
        held_out: Token rows to measure the loss on.
        arguments: The SFTArguments of a run.
    """

    def run(config: s2ft.S2FTConfig) -> tuple[float, float]:
        options = {"d_ratio": 0.0, **{f"{key}_ratio": share for key, share in config.ratios.items()}}
        start = time.perf_counter()
        prepared = prepare(model, "s2ft", {**options, "budget": config.budget}, seed=config.seed)
        with tempfile.TemporaryDirectory() as folder:
            train(prepared, tokenizer, rows, copy.deepcopy(arguments), RunFolder(folder))
        loss = mean_loss(model, held_out)
        s2ft.detach(model)
        return loss, time.perf_counter() - start

    return run


# ---- the command -----------------------------------------------------------------------------------------


def table(found: Search) -> str:
    """Return the divisions as a table, the best first."""
    keys = [key for key in KEYS if any(key in one.shares for one in found.divisions)]
    lines = ["".join(f"{key:>7}" for key in keys) + f"{'trained':>12}{'held-out loss':>15}{'seconds':>9}"]
    for one in sorted(found.divisions, key=lambda one: one.loss):
        shares = "".join(f"{one.shares[key]:>7.0%}" if key in one.shares else f"{'-':>7}" for key in keys)
        note = "  first" * (one is found.divisions[0]) + "  best" * (one is found.best)
        lines.append(f"{shares}{one.trained:>12,}{one.loss:>15.4f}{one.seconds:>9.1f}{note}")
    fall, deviation = found.gain()
    ratios = ", ".join(f"{name} {ratio:.4g}" for name, ratio in found.best.ratios.items())
    seeds = 1 + len(found.checks_of_best)
    return "\n".join(
        [
            *lines,
            f"best: {ratios}",
            f"its loss is {fall:.4f} ± {deviation:.4f} nats lower over {seeds} seeds of the units",
        ]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", default="3.3M", help="trained parameters, for example 3.3M")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="rows of an update")
    parser.add_argument("--held-out", type=int, default=32, help="rows of the validation split")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--runs", type=int, default=12, help="largest number of runs of the search")
    parser.add_argument("--checks", type=int, default=1, help="other seeds for the first and the best division")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    given = parser.parse_args(arguments)
    budget = s2ft.S2FTConfig(d_ratio=1.0, budget=given.budget).budget
    model, tokenizer = load_model(given.model or default_model(), given.dtype)
    prompt = prompt_format(tokenizer)
    prompt.apply_to(tokenizer)
    count = given.steps * given.batch
    rows = token_rows(tokenizer, problem_set(count + given.held_out, False, given.seed), prompt)
    train_rows, held_out = rows.select(range(count)), rows.select(range(count, count + given.held_out))
    with tempfile.TemporaryDirectory() as folder:
        run = short_run(model, tokenizer, train_rows, held_out, _arguments(given, folder))
        found = search(model, run, budget, runs=given.runs, checks=given.checks, seed=given.seed)
    print(table(found))
    if given.output:
        content = {**{name: str(value) for name, value in vars(given).items()}, **asdict(found)}
        given.output.write_text(json.dumps(content, indent=1))


def _arguments(given: argparse.Namespace, folder: str):
    return SFTArguments(
        output_dir=folder,
        learning_rate=given.learning_rate,
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        warmup_steps=max(1, given.steps // 10),
        save_steps=0,
        seed=given.seed,
    )


if __name__ == "__main__":
    main()
