"""Tables and figures of the kind comparison, from the results alone.

Every run that an experiment asks for has its place in a table, and a missing or failed one says so.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bench.experiments.comparison import COSTS, ROUNDS, base_runs, best_rate, cost_runs, rates_of, run_of, trains_on
from bench.experiments.printing import Column, Figure, Series, Spread, Table, failures
from bench.experiments.runner import ExperimentRun, Results

LIMITS = (0.05, 0.1, 0.2)  # of forgetting, in nats a token
FRONTIER = (0.01, *LIMITS[:2], math.inf)
PAIRED = FRONTIER.index(0.05)  # the limit at which methods are compared seed by seed
PERCENT, NATS = ".1f", ".3f"
MEASURES = {
    "test": Column("test", "test %", PERCENT),
    "average": Column("average", "average %", PERCENT),
    "validation": Column("validation", "validation %", PERCENT),
    "near": Column("near", "near transfer %", PERCENT),
    "loss": Column("loss", "held-out loss", ".4f"),
    "kl": Column("kl", "KL(base‖tuned)", NATS),
}
COST_COLUMNS = (
    Column("seconds_per_step", "s a step", ".2f"),
    Column("memory", "peak memory MiB", ".0f"),
    Column("trainable", "trained M", ".2f"),
)


class ExperimentReport:
    """The results of a comparison.

    Args:
        experiment: The experiment.
        results: The results of its runs.
    """

    def __init__(self, experiment: dict[str, Any], results: Results) -> None:
        self.experiment, self.results = experiment, results
        self.titles = {name: row.get("title", name) for name, row in experiment["rows"].items()}
        self.seeds = experiment["seeds"]
        self.sweep = experiment.get("sweep")

    def run(self, row: str, task: str, rate: float, seed: int) -> ExperimentRun:
        return run_of(self.experiment, row, task, rate, seed)

    def numbers(self, run: ExperimentRun) -> dict[str, float] | None:
        """Return the numbers of a run as the tables show them, or None if it is not there."""
        row = self.results.row(run)
        if row is None:
            return None
        tests, found = {name: 100 * share for name, share in row["tests"].items()}, {}
        if "test" in tests:
            near = [share for name, share in tests.items() if name != "test"]
            found = {"test": tests["test"]}
        elif tests:
            near, found = [], {**tests, "average": statistics.fmean(tests.values())}
        if "validation" in row:
            found["validation"] = 100 * row["validation"]
        if tests and near:
            found["near"] = statistics.fmean(near)
        found |= {"loss": row["loss"]} if "loss" in row else {}
        found |= {f"forgetting, {name}": rise for name, rise in row.get("forgetting", {}).items()}
        return found | ({"kl": row["kl"]} if "kl" in row else {})

    def rate(self, row: str, task: str) -> float | None:
        return best_rate(self.experiment, self.results, row, task)

    def over_seeds(self, row: str, task: str, rate: float | None = None) -> list[dict[str, float]]:
        """Return the numbers of a row at a rate, or at its best one, an entry for each seed that is there."""
        rate = self.rate(row, task) if rate is None else rate
        runs = [] if rate is None else [self.numbers(self.run(row, task, rate, seed)) for seed in self.seeds]
        return [run for run in runs if run is not None]

    def costs(self, row: str) -> dict[str, float]:
        """Return the time of an update in seconds, the peak memory in MiB and the trained parameters in millions."""
        found = [one for run in cost_runs(self.experiment, [row]) if (one := self.results.row(run)) is not None]
        if not found:
            return {}
        return {
            "seconds_per_step": min(one["seconds_per_step"] for one in found),
            "memory": min(one["peak_bytes"] for one in found) / 2**20,
            "trainable": found[0]["trainable"] / 1e6,
        }

    # ---- tables ------------------------------------------------------------------------------------------

    def _table(
        self, name: str, title: str, head: Sequence[Column], rows: Sequence[tuple[list[Any], list[dict[str, float]]]],
        notes: Sequence[str] = (),
    ) -> Table:  # fmt: skip
        """Make a table of cells and the numbers of the runs of each row. Columns without numbers are left out."""
        names = list(dict.fromkeys(name for _, runs in rows for run in runs for name in run))
        cells = []
        for first, runs in rows:
            found = [
                Spread.of([run[name] for run in runs if name in run]) if any(name in run for run in runs) else None
                for name in names
            ]
            cells.append([*first, *(found if runs else ["not run", *[None] * len(names)][: len(names)])])
        columns = [
            MEASURES.get(name, Column(name, form=NATS if name.startswith("forgetting") else PERCENT)) for name in names
        ]
        return Table(name, title, [*head, *columns], cells, notes)

    def task_table(self, task: str) -> Table:
        """Make the table of a task: every row at its best rate, or at all its rates, over the seeds, and the base."""
        base = [self.numbers(run) for run in base_runs(self.experiment) if run.labels["task"] == task]
        rows = [(["the base", None], [one for one in base if one])] if base else []
        missing = []
        for row in self.titles:
            if self.sweep and not trains_on(self.experiment, row, task):
                continue
            for rate in [self.rate(row, task)] if self.sweep else rates_of(self.experiment, row):
                found = self.over_seeds(row, task, rate)
                rows.append(([self.titles[row], rate], found))
                missing += [f"{self.titles[row]}: {len(found)}"] if len(found) < len(self.seeds) else []
        notes = [f"Mean ± standard deviation over {len(self.seeds)} seeds."] if len(self.seeds) > 1 else []
        notes += [f"Fewer seeds are there of {', '.join(missing)}."] if missing else []
        found = [line["rows"][0] for line in self.results.lines.values() if line.get("rows")]
        leaked = max((one.get("trained_on_tests", 0) for one in found), default=0)
        notes += [f"The questions of {leaked} rows of the tests are in the training data."] if leaked else []
        grid = [
            (row, rate, seed) for row in self.titles for rate in rates_of(self.experiment, row) for seed in self.seeds
        ]
        runs = [] if self.sweep else [self.run(row, task, rate, seed) for row, rate, seed in grid]
        title = f"Task {task}: each method at its learning rate" if self.sweep else self.experiment["title"]
        head = [Column("row", "method"), Column("rate", "rate")]
        return self._table(task, title, head, rows, [*notes, *failures(runs, self.results)])

    def training_table(self, task: str) -> Table:
        """Make the table of sizes, losses and times of an experiment without a sweep."""
        columns = (
            Column("trainable", "parameters", ",.0f"), Column("best_step", "best at", ".0f"),
            Column("last", "last loss", ".4f"), Column("seconds_per_step", "s an update", ".4f"),
            Column("tokens_per_second", "tokens/s", ".0f"), Column("peak_bytes", "memory (bytes)", ",.0f"),
        )  # fmt: skip
        cells = []
        for row in self.titles:
            for rate in rates_of(self.experiment, row):
                found = [self.results.row(self.run(row, task, rate, seed)) for seed in self.seeds]
                found = [{**one, "last": one["losses"][-1]} for one in found if one]
                values = [[one[column.name] for one in found if column.name in one] for column in columns]
                cells.append([self.titles[row], rate, *(Spread.of(ones) if ones else None for ones in values)])
        head = [Column("row", "method"), Column("rate", "rate")]
        return Table(f"{task}-training", f"{self.experiment['title']}: training", [*head, *columns], cells)

    def cost_table(self) -> Table:
        """Make the table of time and memory."""
        cells = []
        for row in self.titles:
            found = self.costs(row)
            cells.append([self.titles[row], *(found.get(column.name, "not run") for column in COST_COLUMNS)])
        notes = [
            f"Each row ran alone on all cores. The better of {ROUNDS} runs; the time is the median of its updates."
        ]
        return Table(COSTS, "Time and memory of training", [Column("row", "method"), *COST_COLUMNS], cells, notes)

    def _swept(self, row: str, task: str) -> list[tuple[float, dict[str, float] | None]]:
        rates = rates_of(self.experiment, row)
        return [(rate, self.numbers(self.run(row, task, rate, self.seeds[0]))) for rate in rates]

    def sweep_table(self, task: str) -> Table:
        """Make the table of all learning rates on a task, with one seed."""
        rows = [
            ([self.titles[row], rate, "chosen" if rate == self.rate(row, task) else ""], [one] if one else [])
            for row in self.titles
            for rate, one in self._swept(row, task)
        ]
        head = [Column("row", "method"), Column("rate", "rate"), Column("chosen")]
        return self._one_seed(f"{self._of(task)}rates", f"Task {task}: all learning rates, one seed", head, rows)

    def _of(self, task: str) -> str:
        return "" if task == self.sweep[0] else f"{task}-"

    def _one_seed(self, name: str, title: str, head: Sequence[Column], rows: list) -> Table:
        table = self._table(name, title, head, rows)
        plain = [[cell.mean if isinstance(cell, Spread) else cell for cell in row] for row in table.rows]
        return Table(name, title, table.columns, plain)

    def limits_table(self, task: str) -> Table:
        """Make the table of what each method learns if it may forget only so much.

        Of the learning rates whose forgetting is within a limit, the one with the best validation accuracy counts.
        """
        cells = []
        for row in self.titles:
            found = [one for _, one in self._swept(row, task) if one is not None]
            within = [[one for one in found if forgetting_of(one) <= limit] for limit in LIMITS]
            best = [max(ones, key=lambda one: one["validation"]) if ones else None for ones in within]
            if found:
                cells.append([self.titles[row], *(one and one["test"] for one in best)])
        columns = [Column(f"limit_{limit}", f"test %, forgetting ≤ {limit}", PERCENT) for limit in LIMITS]
        title = f"Task {task}: accuracy within a limit of forgetting on the encyclopedia, one seed"
        return Table(f"{self._of(task)}limits", title, [Column("row", "method"), *columns], cells)

    def frontier_table(self, task: str) -> Table:
        """Make the table of the loss of the answers that each method reaches at a limit of forgetting.

        The scales of a run are points of a curve from the base on, with lines between them. Of all points of all rates
        within the limit, the one with the lowest loss of validation questions counts; the loss is that of the test
        questions there.
        """
        losses = {
            row: {seed: found for seed in self.seeds if (found := self._losses_within(row, task, seed))}
            for row in self.titles
        }
        lora, cells = losses.get("lora", {}), []
        for row, found in losses.items():
            means = [Spread.of(list(ones)) for ones in zip(*found.values())] or ["not run"] * len(FRONTIER)
            beside = [
                ones[PAIRED] - lora[seed][PAIRED] for seed, ones in found.items() if seed in lora and row != "lora"
            ]
            cells.append([self.titles[row], len(found), *means, Spread.of(beside) if beside else "", len(beside) or ""])
        columns = [Column(f"loss_{limit}", f"test loss, forgetting ≤ {limit}", ".4f") for limit in FRONTIER]
        columns[-1:] = [
            Column("loss", "any forgetting", ".4f"),
            Column("beside", f"minus LoRA's, ≤ {FRONTIER[PAIRED]}", ".3f"),
            Column("pairs", "seeds of both"),
        ]
        title = f"Task {task}: loss of the answers within a limit of forgetting on the encyclopedia"
        return Table(f"{task}-frontier", title, [Column("row", "method"), Column("seeds", form="d"), *columns], cells)

    def _losses_within(self, row: str, task: str, seed: int) -> list[float]:
        """The test loss within each limit of FRONTIER; empty if no rate has run."""
        runs = [self.results.row(self.run(row, task, rate, seed)) for rate in rates_of(self.experiment, row)]
        curves = [run["scaled"] for run in runs if run]
        return [min(_best_within(curve, limit) for curve in curves)[1] for limit in FRONTIER] if curves else []

    def verdict_table(self) -> Table:
        """Make the table of the best S²FT row against the best LoRA row of each task, over the seeds.

        The best row is that with the highest mean accuracy on validation questions, so no test question is used.
        """
        cells = []
        for task in self.experiment["tasks"]:
            best = [self.best_of(kind, task) for kind in ("s2ft", "lora")]
            if None in best:
                continue
            runs = [self.over_seeds(row, task) for row in best]
            ours, theirs = (Spread.of([one["test"] for one in ones]) for ones in runs)
            forgotten = [Spread.of([forgetting_of(one) for one in ones]) for ones in runs]
            difference, spread = ours.mean - theirs.mean, max(ours.sd or 0, theirs.sd or 0)
            word = "within one sd" if abs(difference) <= spread else "above" if difference > 0 else "below"
            first, second = (self.titles[row] for row in best)
            cells.append([task, first, ours, forgotten[0], second, theirs, forgotten[1], difference, word])
        columns = [
            Column("task"), Column("s2ft", "best row of S²FT"), Column("s2ft_test", "test %", PERCENT),
            Column("s2ft_forgetting", "forgetting", NATS), Column("lora", "best row of LoRA"),
            Column("lora_test", "test %", PERCENT), Column("lora_forgetting", "forgetting", NATS),
            Column("difference", "points", "+.1f"), Column("verdict", "S²FT is"),
        ]  # fmt: skip
        return Table("verdict", "The best row of S²FT against the best row of LoRA", columns, cells)

    def best_of(self, kind: str, task: str) -> str | None:
        """Return the row of S²FT, or of LoRA and its variants, with the best validation accuracy on a task."""
        methods = {"s2ft": ("s2ft",), "lora": ("lora", "dora", "rslora")}[kind]
        rows = [row for row in self.titles if self.experiment["rows"][row]["method"] in methods]
        means = {
            row: statistics.fmean(run["validation"] for run in runs)
            for row in rows
            if (runs := self.over_seeds(row, task))
        }
        return max(means, key=means.__getitem__) if means else None

    # ---- figures -----------------------------------------------------------------------------------------

    def sweep_figures(self, task: str) -> list[Figure]:
        """Draw accuracy against forgetting, at all learning rates, and accuracy against memory, over the seeds."""
        curves, points = [], []
        for row in self.titles:
            found = sorted((one for _, one in self._swept(row, task) if one is not None), key=forgetting_of)
            if found:
                x, y = map(forgetting_of, found), (one["test"] for one in found)
                curves.append(Series(self.titles[row], list(x), list(y)))
            runs, costs = self.over_seeds(row, task), self.costs(row)
            if runs and costs:
                tests = Spread.of([run["test"] for run in runs])
                points.append(Series(self.titles[row], [costs["memory"]], [tests.mean], [tests.sd or 0.0]))
        return [
            Figure(
                f"{self._of(task)}forgetting",
                f"Task {task}: accuracy against forgetting, one point a learning rate, one seed",
                "rise of the loss on an encyclopedia in nats", "test accuracy in %", curves,
            ),
            Figure(
                f"{self._of(task)}memory", f"Task {task}: accuracy against peak memory, {len(self.seeds)} seeds",
                "peak memory of training in MiB", "test accuracy in %", points, "",
            ),
        ]  # fmt: skip


def _best_within(curve: list[dict[str, float]], limit: float) -> tuple[float, ...]:
    """Validation and test loss where the former is least up to a limit of forgetting, linear between points."""
    points = sorted((one["forgetting"], one["validation"], one["test"]) for one in curve)
    within = [tuple(losses) for forgetting, *losses in points if forgetting <= limit]
    for (x, *losses), (next_x, *next_losses) in pairwise(points):
        if x <= limit < next_x:
            share = (limit - x) / (next_x - x)
            within.append(tuple(one + (other - one) * share for one, other in zip(losses, next_losses)))
    return min(within)


def forgetting_of(numbers: dict[str, float]) -> float:
    """Return the forgetting on the first of the probes."""
    return next(value for name, value in numbers.items() if name.startswith("forgetting"))


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return the tables of an experiment."""
    report = ExperimentReport(experiment, results)
    costs = [report.cost_table()] if experiment.get(COSTS) else []
    if experiment["settings"].get("scales"):
        return [*(report.frontier_table(task) for task in experiment["tasks"]), *costs]
    tasks = [report.task_table(task) for task in experiment["tasks"]]
    if not report.sweep:
        return [*tasks, *(report.training_table(task) for task in experiment["tasks"])]
    swept = [make(task) for task in report.sweep for make in (report.sweep_table, report.limits_table)]
    return [report.verdict_table(), *tasks, *swept, *costs]


def figures(experiment: dict[str, Any], results: Results) -> list[Figure]:
    """Return the figures of an experiment with a sweep."""
    report = ExperimentReport(experiment, results)
    return [figure for task in report.sweep or () for figure in report.sweep_figures(task)]
