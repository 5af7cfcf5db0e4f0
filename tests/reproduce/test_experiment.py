"""The runs of an experiment: each is made once, failures are kept, and nothing of another run is overwritten."""

import json
import socket
from dataclasses import dataclass, field

import pytest

from s2ft.reproduce import experiment
from s2ft.reproduce.experiment import run_recipe
from s2ft.reproduce.kind import Kind, Planned
from s2ft.reproduce.recipe import Recipe
from s2ft.reproduce.results import Results, Run, digest, machine, versions
from s2ft.reproduce.tables import Column, summary
from s2ft.train.lock import only_run_in


@dataclass
class Options:
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    rate: float = 1.0
    name: str = "lora"
    fails: list[int] = field(default_factory=list)


MADE = []


def plan(options):
    if options.rate < 0:
        raise ValueError("rate must not be negative")
    return [
        Planned({"method": options.name, "seed": seed}, {"seed": seed, "rate": options.rate}) for seed in options.seeds
    ]


def measure(options, run, folder):
    seed = run.configuration["seed"]
    MADE.append(seed)
    if seed in options.fails:
        raise RuntimeError(f"seed {seed} is unlucky\nand more")
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("log")
    return [{"accuracy": 50.0 + seed}]


def tables(recipe, options, runs):
    return [summary("results", recipe.title, runs, [Column("method")], [Column("accuracy", form=".1f")])]


RECIPE = Recipe("mine", "fake", "Mine", "nothing", "nothing", smoke={"rate": 2.0})


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    kind = Kind(Options, plan, measure, tables, smoke=lambda folder: {"name": "tiny"})
    monkeypatch.setattr(experiment, "kind_of", lambda name: kind)
    MADE.clear()


def test_a_run_has_its_configuration_its_versions_and_its_machine(tmp_path):
    found = run_recipe(RECIPE, tmp_path / "out", command="s2ft reproduce mine")
    assert [run.status for run in found.runs] == ["done", "done"] and not found.failed
    (file,) = (tmp_path / "out").glob("runs/lora-seed-1-*/run.json")
    record = json.loads(file.read_text())
    assert record["configuration"] == {"kind": "fake", "seed": 1, "rate": 1.0}
    assert record["rows"] == [{"accuracy": 51.0}] and record["status"] == "done" and record["seconds"] >= 0
    assert record["command"] == "s2ft reproduce mine" and record["date"].endswith("+00:00")
    assert record["id"] == digest(record["configuration"])[:12]
    assert record["versions"] == versions() and {"s2ft", "torch", "transformers", "python"} <= set(record["versions"])
    assert record["machine"] == machine() and record["machine"]["cores"] >= 1
    assert socket.gethostname() not in file.read_text()
    assert (file.parent / "log.txt").is_file() and not (file.parent / ".lock").exists()
    assert "50.5 ± 0.7" in (tmp_path / "out" / "tables" / "results.txt").read_text()


def test_what_is_there_is_not_made_again(tmp_path):
    run_recipe(RECIPE, tmp_path)
    found = run_recipe(RECIPE, tmp_path, {"seeds": [0, 1, 2]}, resume=True)
    assert MADE == [0, 1, 2] and [run.status for run in found.runs] == ["done"] * 3
    run_recipe(RECIPE, tmp_path, {"seeds": [0], "rate": 3.0}, resume=True)
    assert MADE == [0, 1, 2, 0]  # another configuration is another run


def test_a_result_has_the_labels_of_the_present_recipe(tmp_path):
    run_recipe(RECIPE, tmp_path, {"seeds": [0]})
    found = run_recipe(RECIPE, tmp_path, {"seeds": [0], "name": "renamed"}, resume=True)
    assert MADE == [0] and found.tables[0].rows == [["renamed", found.tables[0].rows[0][1]]]


def test_a_failed_run_is_shown_and_made_again(tmp_path, caplog):
    found = run_recipe(RECIPE, tmp_path, {"fails": [0]})
    assert [run.status for run in found.runs] == ["failed", "done"] and MADE == [0, 1]
    assert found.failed[0].error.startswith("RuntimeError: seed 0 is unlucky\nand more\n\nTraceback")
    assert "failed: lora seed 0: RuntimeError: seed 0 is unlucky" in found.tables[0].notes
    assert "lora seed 0 failed: RuntimeError: seed 0 is unlucky" in caplog.text
    found = run_recipe(RECIPE, tmp_path, resume=True)
    assert [run.status for run in found.runs] == ["done", "done"] and MADE == [0, 1, 0]


def test_an_interrupt_ends_the_experiment_and_keeps_what_is_done(tmp_path, monkeypatch):
    def interrupted(options, run, folder):
        if run.configuration["seed"] == 1:
            raise KeyboardInterrupt
        return measure(options, run, folder)

    kind = Kind(Options, plan, interrupted, tables)
    monkeypatch.setattr(experiment, "kind_of", lambda name: kind)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(RECIPE, tmp_path)
    assert [run.status for run in Results(tmp_path).all()] == ["done"]


def test_a_run_of_another_process_is_left_to_it(tmp_path, caplog):
    caplog.set_level("INFO")
    run_recipe(RECIPE, tmp_path, {"seeds": [1]})
    other = Run("mine", {"method": "lora", "seed": 0}, {"kind": "fake", "seed": 0, "rate": 1.0})
    with only_run_in(Results(tmp_path).folder_of(other)):
        found = run_recipe(RECIPE, tmp_path, resume=True)
    assert [run.status for run in found.runs] == ["missing", "done"] and MADE == [1]
    assert "lora seed 0 (1 of 2): another process is making it" in caplog.text
    assert "not run yet: lora seed 0" in found.tables[0].notes


@pytest.mark.parametrize(
    "prepare,message",
    [
        (lambda out: out.write_text(""), "is a file"),
        (lambda out: (out.mkdir(), (out / "mine.txt").write_text("")), "isn't empty and holds no results"),
        (lambda out: (out.mkdir(), (out / "experiment.json").write_text('{"recipe": "other"}')), "of the recipe other"),
        (
            lambda out: (out.mkdir(), (out / "experiment.json").write_text('{"recipe": "mine"}')),
            "--resume goes on there",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, prepare, message):
    prepare(tmp_path / "out")
    with pytest.raises(FileExistsError, match=message):
        run_recipe(RECIPE, tmp_path / "out")
    assert MADE == []


def test_a_mistake_is_found_before_anything_is_written(tmp_path):
    for settings, message in (
        ({"rate": -1}, "rate must not be negative"),
        ({"raet": 1}, "did you mean rate"),
        ({"seeds": []}, "there is nothing to run"),
        ({"seeds": [3, 3]}, "the same run is planned twice: lora seed 3"),
    ):
        with pytest.raises(ValueError, match=message):
            run_recipe(RECIPE, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()


def test_a_smoke_run_can_be_started_again_after_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="rate must not be negative"):
        run_recipe(RECIPE, tmp_path / "out", {"rate": -1}, smoke=True)
    found = run_recipe(RECIPE, tmp_path / "out", smoke=True)
    assert {run.configuration["rate"] for run in found.runs} == {2.0}
    assert {run.labels["method"] for run in found.runs} == {"tiny"}


def test_a_damaged_result_is_named(tmp_path):
    run_recipe(RECIPE, tmp_path, {"seeds": [0]})
    (file,) = tmp_path.glob("runs/*/run.json")
    file.write_text(file.read_text()[:50])
    with pytest.raises(ValueError, match="run.json can't be read.*delete it"):
        run_recipe(RECIPE, tmp_path, {"seeds": [0]}, resume=True)


def test_the_id_does_not_depend_on_the_order_of_keys():
    assert digest({"a": [1, 2], "b": None}) == digest({"b": None, "a": (1, 2)})
    assert digest({"a": 1}) != digest({"a": 1.5})
