"""Tables and figures of the kind comparison, from the results alone.

Every run that an experiment asks for has its place in a table, and a missing or failed one says so.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.experiments.comparison import COSTS, ROUNDS, base_runs, best_within, cost_runs, rates_of, run_of
from bench.experiments.printing import Column, Figure, Series, Spread, Table, failures
from bench.experiments.runner import ExperimentRun, Results

LORA = "lora"  # the row with which the others are compared, seed by seed
PAIRED = "loss_0.05"
LIMITS = {"loss_0.01": 0.01, PAIRED: 0.05, "loss_0.1": 0.1, "any": math.inf}  # of forgetting, in nats a token
DRAWS = 2000  # of questions, for an interval
PERCENT, NATS = ".1f", ".3f"
MEASURES = {
    "test": Column("test", "test %", PERCENT),
    "average": Column("average", "average %", PERCENT),
    "validation": Column("validation", "validation %", PERCENT),
    "loss": Column("loss", "held-out loss", ".4f"),
    "kl": Column("kl", "KL(base‖tuned)", NATS),
    **{name: Column(name, f"test loss, forgetting ≤ {limit}", ".4f") for name, limit in LIMITS.items()},
    "any": Column("any", "any forgetting", ".4f"),
    "chosen": Column("chosen", f"validation loss, ≤ {LIMITS[PAIRED]}", ".4f"),
    "right": Column("right", "right %", PERCENT),
    "beside": Column("beside", f"loss minus LoRA's, ≤ {LIMITS[PAIRED]}", ".3f"),
    "from": Column("from", "95 % over questions, from", ".3f"),
    "to": Column("to", "to", ".3f"),
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

    def run(self, row: str, task: str, rate: float, seed: int) -> ExperimentRun:
        return run_of(self.experiment, row, task, rate, seed)

    def grid(self, task: str) -> list[tuple[str, float]]:
        """Return the rows and rates that the experiment wants on a task."""
        return [(row, rate) for row in self.titles for rate in rates_of(self.experiment, row, task)]

    def over_seeds(self, row: str, task: str, rate: float) -> list[dict[str, Any]]:
        """Return the results of a row at a rate, an entry for each seed that is there."""
        runs = [self.run(row, task, rate, seed) for seed in self.seeds]
        return [found for run in runs if (found := self.results.row(run))]

    def of_base(self, task: str) -> list[dict[str, Any]]:
        """Return the result of the base on a task, a list of one entry, or an empty one."""
        runs = [run for run in base_runs(self.experiment) if run.labels["task"] == task]
        return [found for run in runs if (found := self.results.row(run))]

    def numbers(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the numbers of a result as the tables show them."""
        tests = {name: 100 * share for name, share in row["tests"].items()}
        found = {"test": tests["test"]} if "test" in tests else dict(tests)
        if tests and "test" not in tests:
            found["average"] = statistics.fmean(tests.values())
        if "validation" in row:
            found["validation"] = 100 * row["validation"]
        found |= {"loss": row["loss"]} if "loss" in row else {}
        found |= {f"forgetting, {name}": rise for name, rise in row.get("forgetting", {}).items()}
        return found | ({"kl": row["kl"]} if "kl" in row else {})

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
        """Make the table of a task: every row at all its rates, over the seeds, and the base."""
        rows, missing = [(["the base", None], [self.numbers(one)]) for one in self.of_base(task)], []
        for row, rate in self.grid(task):
            found = list(map(self.numbers, self.over_seeds(row, task, rate)))
            rows.append(([self.titles[row], rate], found))
            missing += [f"{self.titles[row]}: {len(found)}"] if len(found) < len(self.seeds) else []
        notes = [f"Mean ± standard deviation over {len(self.seeds)} seeds."] if len(self.seeds) > 1 else []
        notes += [f"Fewer seeds are there of {', '.join(missing)}."] if missing else []
        found = [line["rows"][0] for line in self.results.lines.values() if line.get("rows")]
        leaked = max((one.get("trained_on_tests", 0) for one in found), default=0)
        notes += [f"The questions of {leaked} rows of the tests are in the training data."] if leaked else []
        runs = [self.run(row, task, rate, seed) for row, rate in self.grid(task) for seed in self.seeds]
        head = [Column("row", "method"), Column("rate", "rate")]
        return self._table(task, self.experiment["title"], head, rows, [*notes, *failures(runs, self.results)])

    def training_table(self, task: str) -> Table:
        """Make the table of sizes, losses and times."""
        columns = (
            Column("trainable", "parameters", ",.0f"), Column("best_step", "best at", ".0f"),
            Column("last", "last loss", ".4f"), Column("seconds_per_step", "s an update", ".4f"),
            Column("tokens_per_second", "tokens/s", ".0f"), Column("peak_bytes", "memory (bytes)", ",.0f"),
        )  # fmt: skip
        cells = []
        for row, rate in self.grid(task):
            found = [{**one, "last": one["losses"][-1]} for one in self.over_seeds(row, task, rate)]
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

    def frontier_table(self, task: str) -> Table:
        """Make the table of the loss of the answers that each method reaches at a limit of forgetting.

        Of all rates, the one with the lowest loss of validation questions within the limit counts, see
        :func:`best_within`. The loss is that of the test questions there.
        """
        lora = {seed: self._runs(LORA, task, seed) for seed in self.seeds if LORA in self.titles}
        rows = []
        for row in dict(self.grid(task)):
            found, pairs = [], []
            for seed in self.seeds:
                runs, others = self._runs(row, task, seed), lora.get(seed)
                if not runs:
                    continue
                found.append(_within(runs))
                if others and row != LORA:
                    found[-1]["beside"] = found[-1][PAIRED] - _within(others)[PAIRED]
                    pairs.append((_best(runs), _best(others)))
            if found:
                found[0] |= _interval(pairs)  # one for all seeds: a column shows the mean of the numbers that are there
            rows.append(([self.titles[row], len(found)], found))
        rows += [(["the base", None], [{"right": _right(one)}]) for one in self.of_base(task)]
        limit = self.experiment["settings"].get("answer_within")
        notes = [f"Right answers are those at the loss within {limit}."] if limit else []
        title = f"Task {task}: loss of the answers within a limit of forgetting on the encyclopedia"
        head = [Column("row", "method"), Column("seeds", form="d")]
        return self._table(f"{task}-frontier", title, head, rows, notes)

    def _runs(self, row: str, task: str, seed: int) -> list[dict[str, Any]]:
        """The results of a row with a seed at all its rates."""
        runs = [self.run(row, task, rate, seed) for rate in rates_of(self.experiment, row, task)]
        return [found for run in runs if (found := self.results.row(run))]

    # ---- figures -----------------------------------------------------------------------------------------

    def frontier_figure(self, task: str) -> Figure:
        """Draw loss against forgetting: for each rate of each row a line over the scales, means over the seeds."""
        lines = []
        for row, rate in self.grid(task):
            curves = [run["scaled"][1:] for run in self.over_seeds(row, task, rate)]  # the first point is the base
            points = list(zip(*curves))
            x, y = ([statistics.fmean(one[name] for one in ones) for ones in points] for name in ("forgetting", "test"))
            lines += [Series(f"{self.titles[row]}, {rate:g}", x, y)] if points else []
        title = f"Task {task}: loss of the answers against forgetting, parts of the update, mean over seeds"
        words = ("rise of the loss on an encyclopedia in nats", "loss of the answers in nats")
        return Figure(f"{task}-frontier", title, *words, lines)


def _best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the lowest validation loss within PAIRED."""
    return min(runs, key=lambda run: best_within(run["scaled"], LIMITS[PAIRED]))


def _within(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The test loss within each of LIMITS, the validation loss within PAIRED, and the right answers there in %."""
    found = {name: min(best_within(run["scaled"], limit) for run in runs)[1] for name, limit in LIMITS.items()}
    best = _best(runs)
    found["chosen"] = best_within(best["scaled"], LIMITS[PAIRED])[0]
    return found | ({"right": _right(best)} if "tests" in best else {})


def _interval(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """Where the loss minus LoRA's lies, mean over seeds, if the test questions are drawn anew: a bootstrap, 95 %.

    Args:
        pairs: The best run of a row, and LoRA's, for each seed. All have the same questions.

    Returns:
        Its ends. Empty if in no pair both runs keep the loss of each question.
    """
    pairs = [pair for pair in pairs if all("each" in run["scaled"][0] for run in pair)]
    if not pairs:
        return {}
    differences = np.mean([_of_questions(mine) - _of_questions(other) for mine, other in pairs], axis=0)
    tokens = np.array(pairs[0][0]["scaled"][0]["tokens"])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(DRAWS, len(tokens)))
    means = differences[drawn].sum(1) / tokens[drawn].sum(1)
    return dict(zip(("from", "to"), np.quantile(means, (0.025, 0.975)).tolist()))


def _of_questions(run: dict[str, Any]) -> np.ndarray:
    """The loss of each test question, summed over its answer, at the scale of :func:`best_within`."""
    *_, scale = best_within(run["scaled"], LIMITS[PAIRED])
    scales = [point["scale"] for point in run["scaled"]]
    return np.array([np.interp(scale, scales, ones) for ones in zip(*(point["each"] for point in run["scaled"]))])


def _right(row: dict[str, Any]) -> float:
    """The right answers of a run in %, the mean over its sets of tests."""
    return 100 * statistics.fmean(row["tests"].values())


def tables(experiment: dict[str, Any], results: Results) -> list[Table]:
    """Return the tables of an experiment."""
    report = ExperimentReport(experiment, results)
    costs = [report.cost_table()] if experiment.get(COSTS) else []
    if experiment["settings"].get("scales"):
        return [*(report.frontier_table(task) for task in experiment["tasks"]), *costs]
    made = (report.task_table, report.training_table)
    return [*(make(task) for make in made for task in experiment["tasks"]), *costs]


def figures(experiment: dict[str, Any], results: Results) -> list[Figure]:
    """Return the figures of an experiment that answers questions on its curves."""
    report = ExperimentReport(experiment, results)
    return [report.frontier_figure(task) for task in experiment["tasks"] if "answer_within" in experiment["settings"]]
