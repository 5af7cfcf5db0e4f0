"""The runner keeps each result, goes on where it was interrupted, and says what failed."""

import multiprocessing
import os

import pytest
import torch

from bench.experiments import runner
from bench.experiments.printing import Column, summary
from bench.experiments.runner import DONE, FAILED, OOM, ExperimentRun, Results, Stage, make


def run_of(number, **settings):
    return ExperimentRun({"row": "a", "seed": number}, {"seed": number, **settings})


@pytest.fixture
def measured(monkeypatch):
    """A kind of experiment whose runs fail as their settings say. Returns the seeds of the runs that were made."""
    made = []

    def measure(settings, folder):
        made.append(settings["seed"])
        if settings.get("error"):
            raise {"memory": torch.OutOfMemoryError, "value": ValueError}[settings["error"]]("too much")
        return [{"loss": 1.0 + settings["seed"]}]

    monkeypatch.setattr(runner, "import_module", lambda name: type("Kind", (), {"measure": staticmethod(measure)}))
    return made


def test_what_has_a_result_is_not_made_again_and_what_failed_is(measured, tmp_path):
    runs = [run_of(0), run_of(1, error="value"), run_of(2, error="memory")]
    stages = [Stage(runs)]
    results = Results(tmp_path / "mine.jsonl")
    assert not make("mine", stages, results, workers=0)
    assert [results.line(run)["status"] for run in runs] == [DONE, FAILED, OOM] and measured == [0, 1, 2]
    line = results.line(runs[0])
    assert (
        line["rows"] == [{"loss": 1.0}]
        and torch.__version__.startswith(line["machine"]["torch"])
        and line["seconds"] >= 0
    )
    assert "ValueError: too much" in results.line(runs[1])["error"]
    again = Results(tmp_path / "mine.jsonl")
    make("mine", stages, again, workers=0)
    assert measured == [0, 1, 2, 1] and again.row(runs[0]) == {"loss": 1.0}


def test_stages_follow_each_other_and_a_limit_or_a_part_leaves_runs_out(measured, tmp_path):
    results = Results(tmp_path / "mine.jsonl")
    for limit in ({"seconds": -1}, {"part": (1, 2)}):
        assert not make("mine", [Stage([run_of(0), run_of(0), run_of(1)])], results, workers=0, **limit)
    assert measured == [1]
    assert make("mine", [Stage([run_of(0), run_of(1)]), Stage([run_of(9)])], results, workers=0)
    assert measured == [1, 0, 9]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_process_that_ends_is_a_failed_run_and_the_others_go_on(tmp_path, monkeypatch, fresh):
    """The processes are forks, which import nothing again."""
    monkeypatch.setattr(runner, "measured", measured_in_a_process)
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda how, get=multiprocessing.get_context: get("fork"))
    runs, results = [run_of(0), run_of(1), run_of(2)], Results(tmp_path / "mine.jsonl")
    make("mine", [Stage(runs, alone=True, fresh=fresh)], results, show=lambda text: None)
    assert [results.line(run)["status"] for run in runs] == [FAILED, DONE, DONE]
    assert "its process ended" in results.line(runs[0])["error"]


def measured_in_a_process(kind, run, folder):
    if run.settings["seed"] == 0:
        os._exit(9)
    return {"status": DONE, "rows": [], "seconds": 0.0, "machine": {}}


def test_settings_decide_what_a_result_belongs_to(tmp_path):
    assert (
        run_of(0, a=1, b=2).digest
        == ExperimentRun({}, {"b": 2, "a": 1, "seed": 0}).digest
        != run_of(0, a=2, b=2).digest
    )
    assert run_of(0, data="here").digest == run_of(0, data="there").digest  # `files` has what lies there
    (tmp_path / "mine.jsonl").write_text("no\n")
    with pytest.raises(ValueError, match=r"mine.jsonl, line 1 is not JSON"):
        Results(tmp_path / "mine.jsonl")


# ---- tables ----------------------------------------------------------------------------------------------


def test_every_run_is_in_the_table(tmp_path):
    results, runs = Results(tmp_path / "mine.jsonl"), [run_of(0), run_of(1), run_of(2), run_of(3)]
    for run in runs[:2]:
        results.add({"digest": run.digest, "status": DONE, "rows": [{"loss": 1.0 + run.labels["seed"], "size": 7}]})
    results.add({"digest": runs[2].digest, "status": FAILED, "error": "ValueError: too much\nmore"})
    other = ExperimentRun({"row": "b", "seed": 0}, {})
    values = [Column("loss", form=".2f"), Column("size", form="d"), Column("nothing")]
    assert summary("t", "Loss", [*runs, other], results, [Column("row")], values).markdown().splitlines() == [
        "**Loss**", "", "| row | loss | size |", "| --- | --: | --: |", "| a | 1.50 ± 0.71 | 7 |", "| b | not run | – |",
        "", "mean ± standard deviation over 2 runs  ", "a-2 failed: ValueError: too much  ", "not run yet: a-3, b-0  ",
    ]  # fmt: skip


def test_the_committed_tables_are_printed_from_the_committed_runs(tmp_path):
    """docs/evidence.md includes them."""
    from bench.experiments.__main__ import chosen, parser, read, report

    folder = runner.Path(runner.__file__).parent / "results"
    for words in (
        ["evidence"],
        ["screening"],
        ["frontier"],
        ["second-model"],
        ["small-sequence", "--only", "s2ft-disjoint", "lora"],
    ):
        (tmp_path / f"{words[0]}.jsonl").write_bytes((folder / f"{words[0]}.jsonl").read_bytes())
        results = Results(tmp_path / f"{words[0]}.jsonl")
        report(words[0], chosen(read(words[0]), parser().parse_args(words)), results, tmp_path)
        assert all(line["status"] == DONE for line in results.lines.values())
    printed = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.md")}
    assert len(printed) == 16 and printed == {
        file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")
    }
    assert len(list(tmp_path.glob("evidence-*-frontier.png"))) == 3
