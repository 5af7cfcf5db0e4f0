"""Tables and figures of the evidence. `make evidence` runs it at the end.

    python -m bench.evidence.report [--runs DIR_OR_FILE] [--results DIR] [--figures DIR] [--config FILE]

Without --runs it reads the committed results (results/runs.jsonl), from which anybody can make the tables again.

Every run that evidence.yaml asks for has its place in a table, and a missing or failed one says so.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

from bench.evidence.run import CONFIG, HERE, ROUNDS, Results, Run, base_runs, best_rate, cost_runs
from s2ft.reproduce.figures import Figure, Series, save_figures
from s2ft.reproduce.tables import Column, Spread, Table

LIMITS = (0.05, 0.1, 0.2)  # of forgetting, in nats a token
PERCENT, NATS = ".1f", ".3f"
MEASURES = (
    Column("test", "test %", PERCENT),
    Column("validation", "validation %", PERCENT),
    Column("near", "near transfer %", PERCENT),
    Column("encyclopedia", "forgetting, encyclopedia", NATS),
    Column("documentation", "forgetting, documentation", NATS),
    Column("kl", "KL(base‖tuned)", NATS),
)
COSTS = (
    Column("seconds_per_step", "s a step", ".2f"),
    Column("memory", "peak memory MiB", ".0f"),
    Column("trainable", "trained M", ".2f"),
)


class Report:
    """The results of a comparison.

    Args:
        config: The content of evidence.yaml.
        results: The results of the runs.
    """

    def __init__(self, config: dict[str, Any], results: Results) -> None:
        self.config, self.results = config, results
        self.rows = {name: row["title"] for name, row in config["rows"].items()}
        self.full = [name for name, row in config["rows"].items() if not row.get("screened")]
        self.rates = {name: best_rate(name, config, results) for name in self.full}

    def values(self, run: Run) -> dict[str, float] | None:
        """Return the numbers of a run as the tables show them, or None if it is not there."""
        result = self.results.get(run, self.config)
        if result is None:
            return None
        near = list(result["near"].values())
        return {
            "test": 100 * result["test"],
            "validation": 100 * result["validation"],
            **({"near": 100 * statistics.fmean(near)} if near else {}),
            **result["forgetting"],
            "kl": result["kl"],
        }

    def costs(self, row: str) -> dict[str, float]:
        """Return the time of an update in seconds, the peak memory in MiB and the trained parameters in millions."""
        runs = [self.results.get(run, self.config) for run in cost_runs(self.config, [row])]
        runs = [run for run in runs if run is not None]
        if not runs:
            return {}
        return {
            "seconds_per_step": min(run["seconds_per_step"] for run in runs),
            "memory": min(run["peak_bytes"] for run in runs) / 2**20,
            "trainable": runs[0]["trainable"] / 1e6,
        }

    def over_seeds(self, row: str, task: str) -> list[dict[str, float]]:
        """Return the numbers of a row at its best rate, one entry for each seed that is there."""
        rate = self.rates[row]
        if rate is None:
            return []
        runs = [self.values(Run(row, task, rate, seed)) for seed in self.config["seeds"]]
        return [run for run in runs if run is not None]

    def notes(self) -> list[str]:
        machines = sorted({json.dumps(one["machine"], sort_keys=True) for one in self.results.all()})
        return [f"Machine: {', '.join(f'{k} {v}' for k, v in json.loads(one).items())}." for one in machines]

    # ---- tables ------------------------------------------------------------------------------------------

    def task_table(self, task: str) -> Table:
        """Make the table of a task: every row at its best rate, over the seeds, and the base."""
        columns = [Column("row", "method"), Column("rate", "rate"), *MEASURES]
        base = next((self.values(run) for run in base_runs(self.config) if run.task == task), None)
        cells = [["the base", None, *((base or {}).get(column.name) for column in MEASURES)]]
        rows = [row for row in self.full if task == self.config["sweep"] or self.trains_on(row, task)]
        for row in rows:
            cells.append([self.rows[row], self.rates[row], *self._spreads(self.over_seeds(row, task))])
        present = [
            place for place in range(len(columns)) if place < 2 or any(one[place] not in (None, "") for one in cells)
        ]
        counts = {row: len(self.over_seeds(row, task)) for row in rows}
        missing = [f"{self.rows[row]}: {n}" for row, n in counts.items() if n < len(self.config["seeds"])]
        notes = [f"Mean ± standard deviation over {len(self.config['seeds'])} seeds."]
        notes += [f"Fewer seeds are there of {', '.join(missing)}."] if missing else []
        return Table(
            f"evidence-{task}",
            f"Task {task}: each method at its learning rate",
            [columns[place] for place in present],
            [[one[place] for place in present] for one in cells],
            notes,
        )

    def trains_on(self, row: str, task: str) -> bool:
        """Whether evidence.yaml wants a row on a task."""
        return task in self.config["rows"][row].get("tasks", self.config["tasks"])

    def cost_table(self) -> Table:
        """Make the table of time and memory."""
        cells = []
        for row in self.full:
            found = self.costs(row)
            cells.append([self.rows[row], *(found.get(column.name, "not run") for column in COSTS)])
        notes = [
            f"Each row ran alone on all cores. The better of {ROUNDS} runs; the time is the median of its updates."
        ]
        return Table("evidence-costs", "Time and memory of training", [Column("row", "method"), *COSTS], cells, notes)

    def _spreads(self, runs: list[dict[str, float]]) -> list[Any]:
        if not runs:
            return ["not run", *[None] * (len(MEASURES) - 1)]
        return [
            Spread.of([run[column.name] for run in runs]) if runs[0].get(column.name) is not None else None
            for column in MEASURES
        ]

    def sweep_table(self) -> Table:
        """Make the table of all learning rates, with one seed."""
        task, seed, cells = self.config["sweep"], self.config["seeds"][0], []
        for row in self.full:
            for rate in self.config["rows"][row].get("rates", []):
                found = self.values(Run(row, task, rate, seed))
                mark = "chosen" if rate == self.rates[row] else ""
                cells.append([self.rows[row], rate, mark, *self._one(found)])
        columns = [Column("row", "method"), Column("rate", "rate"), Column("chosen", ""), *MEASURES]
        return Table("evidence-rates", f"Task {task}: all learning rates, one seed", columns, cells)

    def limits_table(self) -> Table:
        """Make the table of what each method learns if it may forget only so much.

        Of the learning rates whose forgetting is within a limit, the one with the best validation accuracy counts.
        """
        task, seed, cells = self.config["sweep"], self.config["seeds"][0], []
        for row in self.full:
            rates = self.config["rows"][row].get("rates", [])
            found = [run for rate in rates if (run := self.values(Run(row, task, rate, seed))) is not None]
            within = [[run for run in found if run["encyclopedia"] <= limit] for limit in LIMITS]
            best = [max(runs, key=lambda run: run["validation"]) if runs else None for runs in within]
            if found:
                cells.append([self.rows[row], *(run and run["test"] for run in best)])
        columns = [Column(f"limit_{limit}", f"test %, forgetting ≤ {limit}", PERCENT) for limit in LIMITS]
        title = f"Task {task}: accuracy within a limit of forgetting on the encyclopedia, one seed"
        return Table("evidence-limits", title, [Column("row", "method"), *columns], cells)

    def candidates_table(self) -> Table:
        """Make the table of the selections that were tried, beside the random selection at the same rate."""
        task, seed, cells = self.config["sweep"], self.config["seeds"][0], []
        tried = {rate for row in self.config["rows"].values() if row.get("screened") for rate in row["rates"]}
        for row, entry in self.config["rows"].items():
            for rate in sorted(tried & set(entry.get("rates", []))) if entry["method"] == "s2ft" else ():
                run = Run(row, task, rate, seed)
                trained = (self.results.get(run, self.config) or {}).get("trainable")
                cells.append([self.rows[row], trained and trained / 1e6, *self._one(self.values(run))])
        columns = [Column("row", "selection"), Column("trained", "trained M", ".2f"), *MEASURES]
        title = f"Task {task}: selections at the learning rate {' and '.join(map(str, sorted(tried)))}, one seed"
        return Table("evidence-selections", title, columns, cells)

    def _one(self, found: dict[str, float] | None) -> list[Any]:
        return [(found or {}).get(column.name) for column in MEASURES] if found else ["not run", *[None] * 5]

    def verdict_table(self) -> Table:
        """Make the table of the best S²FT row against the best LoRA row of each task, over the seeds.

        The best row is that with the highest mean accuracy on validation questions, so no test question is used.
        """
        cells = []
        for task in self.config["tasks"]:
            best = [self.best_of(kind, task) for kind in ("s2ft", "lora")]
            if None in best:
                continue
            ours, theirs = ([run["test"] for run in self.over_seeds(row, task)] for row in best)
            forgotten = [[run["encyclopedia"] for run in self.over_seeds(row, task)] for row in best]
            spread = max(Spread.of(ours).sd or 0, Spread.of(theirs).sd or 0)
            difference = statistics.fmean(ours) - statistics.fmean(theirs)
            word = "within one sd" if abs(difference) <= spread else "above" if difference > 0 else "below"
            cells.append(
                [
                    task, self.rows[best[0]], Spread.of(ours), Spread.of(forgotten[0]), self.rows[best[1]],
                    Spread.of(theirs), Spread.of(forgotten[1]), difference, word,
                ]
            )  # fmt: skip
        columns = [
            Column("task"), Column("s2ft", "best row of S²FT"), Column("s2ft_test", "test %", PERCENT),
            Column("s2ft_forgetting", "forgetting", NATS), Column("lora", "best row of LoRA"),
            Column("lora_test", "test %", PERCENT), Column("lora_forgetting", "forgetting", NATS),
            Column("difference", "points", "+.1f"), Column("verdict", "S²FT is"),
        ]  # fmt: skip
        return Table("evidence-verdict", "The best row of S²FT against the best row of LoRA", columns, cells)

    def best_of(self, kind: str, task: str) -> str | None:
        """Return the row of S²FT, or of LoRA and its variants, with the best validation accuracy on a task."""
        methods = {"s2ft": ("s2ft",), "lora": ("lora", "dora", "rslora")}[kind]
        rows = [row for row in self.full if self.config["rows"][row]["method"] in methods]
        means = {
            row: statistics.fmean(run["validation"] for run in runs)
            for row in rows
            if (runs := self.over_seeds(row, task))
        }
        return max(means, key=means.__getitem__) if means else None

    # ---- figures -----------------------------------------------------------------------------------------

    def figures(self) -> list[Figure]:
        """Draw accuracy against forgetting, at all learning rates, and accuracy against memory, over the seeds."""
        task, seed = self.config["sweep"], self.config["seeds"][0]
        curves, points = [], []
        for row in self.full:
            found = [self.values(Run(row, task, rate, seed)) for rate in self.config["rows"][row].get("rates", [])]
            found = sorted((run for run in found if run is not None), key=lambda run: run["encyclopedia"])
            if found:
                curves.append(
                    Series(self.rows[row], [run["encyclopedia"] for run in found], [run["test"] for run in found])
                )
            runs, costs = self.over_seeds(row, task), self.costs(row)
            if runs and costs:
                tests = Spread.of([run["test"] for run in runs])
                points.append(Series(self.rows[row], [costs["memory"]], [tests.mean], [tests.sd or 0.0]))
        return [
            Figure(
                "evidence-forgetting", f"Task {task}: accuracy against forgetting, one point a learning rate, one seed",
                "rise of the loss on an encyclopedia in nats", "test accuracy in %", curves,
            ),
            Figure(
                "evidence-memory", f"Task {task}: accuracy against peak memory, {len(self.config['seeds'])} seeds",
                "peak memory of training in MiB", "test accuracy in %", points, "points",
            ),
        ]  # fmt: skip

    def tables(self) -> list[Table]:
        return [
            self.verdict_table(), *map(self.task_table, self.config["tasks"]), self.sweep_table(),
            self.limits_table(), self.candidates_table(), self.cost_table(),
        ]  # fmt: skip


def write_report(config: dict[str, Any], results: Results, folder: Path, figures: Path) -> Path:
    """Write tables, figures, all results in one file, and one page with all tables.

    Args:
        config: The content of evidence.yaml.
        results: The results of the runs.
        folder: The folder of tables and results.
        figures: The folder of the figures.

    Returns:
        The page, a Markdown file.
    """
    report, runs = Report(config, results), results.all()
    tables = report.tables()
    for table in tables:
        table.save(folder)
    save_figures(report.figures(), figures)
    hours = sum(one["seconds"] for one in runs) / 3600
    head = [f"{len(runs)} runs, {hours:.2f} hours of one core.", *report.notes(), ""]
    page = folder / "evidence.md"
    page.write_text("\n".join([*head, *(table.markdown() for table in tables)]), encoding="utf-8")
    (folder / "runs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in runs), encoding="utf-8")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=str(HERE / "results" / "runs.jsonl"))
    parser.add_argument("--results", default=str(HERE / "results"))
    parser.add_argument("--figures", default=str(HERE.parents[1] / "docs" / "assets"))
    parser.add_argument("--config", default=str(CONFIG))
    arguments = parser.parse_args()
    config = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
    results = Results(Path(arguments.runs))
    print(write_report(config, results, Path(arguments.results), Path(arguments.figures)).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
