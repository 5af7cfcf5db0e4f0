"""Every recipe runs from start to end on a tiny model, and what it reports is what a direct computation gives."""

import json
import logging

import pytest
import torch

import s2ft
from s2ft.cli.main import main
from s2ft.reproduce import experiment
from s2ft.reproduce.data import text_rows
from s2ft.reproduce.experiment import run_recipe
from s2ft.reproduce.recipe import read_recipe
from s2ft.text.divergence import mean_loss
from s2ft.text.models import load_model
from s2ft.text.prompts import prompt_format
from s2ft.text.scoring import is_right
from s2ft.train.output import read_log

TRAINING = ("commonsense", "arithmetic", "instruction", "selection", "projections")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """smoke(name): the experiment of a recipe's smoke run, and its folder. It is run once. Only one is drawn."""
    made = {}

    def run(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                if name != "instruction":
                    patch.setattr(experiment, "save_figures", lambda figures, folder: [])
                made[name] = run_recipe(read_recipe(name), folder / "out", smoke=True), folder / "out"
        return made[name]

    return run


@pytest.mark.parametrize("name", TRAINING)  # test_studies.py runs the others
def test_every_recipe_runs(smoke, name):
    found, folder = smoke(name)
    assert found.runs and [run.error for run in found.failed] == []
    assert [run.status for run in found.runs] == ["done"] * len(found.runs)
    for table in found.tables:
        assert table.rows and all(
            (folder / "tables" / f"{table.name}.{end}").is_file() for end in ("txt", "csv", "tex")
        )
    for run in found.runs:
        assert run.rows and run.versions["torch"] == torch.__version__ and run.machine["processor"]


def rows_of(experiment):
    return {tuple(run.labels.values()): run.rows[0] for run in experiment.runs}


def test_accuracies_are_those_of_the_answers(smoke):
    found, folder = smoke("commonsense")
    tasks = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA")
    for run in found.runs:
        (row,), (place,) = run.rows, folder.glob(f"runs/*-{run.id}")
        for task in tasks:
            records = [json.loads(line) for line in (place / "answers" / f"{task}.jsonl").read_text().splitlines()]
            right = [is_right(record["generated"], record["answer"], "commonsense") for record in records]
            assert len(records) == 3 and row[task] == pytest.approx(100 * sum(right) / 3)
        assert row["average"] == pytest.approx(sum(row[task] for task in tasks) / 8)
    assert found.tables[0].rows[0][2] == rows_of(found)[("s2ft", 0.02, 0)]["trained"]


def test_the_best_evaluation_is_scored(smoke):
    found, folder = smoke("commonsense")
    for run in found.runs:
        (place,) = folder.glob(f"runs/*-{run.id}")
        losses = {line["step"]: line["eval_loss"] for line in read_log(place / "log.jsonl") if "eval_loss" in line}
        best = min(losses, key=losses.__getitem__)
        assert run.rows[0]["best_step"] == best
        assert run.rows[0]["held_out_loss"] == pytest.approx(losses[best], abs=1e-5)


def test_forgetting_and_the_saved_adapter(smoke):
    """The adapter, loaded onto the base, has the losses of the run; without it they are those of the base."""
    found, folder = smoke("instruction")
    model, tokenizer = load_model(str(folder / "smoke" / "model"), "float32")
    prompt = prompt_format(tokenizer, chat_template="alpaca")
    other = text_rows(str(folder / "smoke" / "data" / "other_text.jsonl"), model, tokenizer, prompt, 2048, 256)
    before = mean_loss(model, other)
    rows = rows_of(found)
    assert rows[("base", None, None)]["forgetting"] == 0.0 and rows[("base", None, None)]["kl"] == 0.0
    assert rows[("base", None, None)]["other_loss"] == pytest.approx(before, abs=1e-6)
    (adapter,) = folder.glob("runs/s2ft-*/adapter")
    s2ft.load_adapter(model, adapter)
    row = rows[("s2ft", 0.02, 0)]
    assert mean_loss(model, other) - before == pytest.approx(row["forgetting"], abs=1e-6) != 0
    assert s2ft.read_adapter(adapter).info["prompt"]["template"] == prompt.template
    assert row["kl"] > 0 and rows[("full", 0.02, 0)]["kl"] > 0


def test_the_adapter_of_peft_is_saved(smoke):
    peft = pytest.importorskip("peft")
    found, folder = smoke("instruction")
    model, tokenizer = load_model(str(folder / "smoke" / "model"), "float32")
    prompt = prompt_format(tokenizer, chat_template="alpaca")
    other = text_rows(str(folder / "smoke" / "data" / "other_text.jsonl"), model, tokenizer, prompt, 2048, 256)
    before = mean_loss(model, other)
    (adapter,) = folder.glob("runs/lora-*/adapter")
    tuned = peft.PeftModel.from_pretrained(model, adapter)
    expected = rows_of(found)[("lora", 0.02, 0)]["forgetting"]
    assert mean_loss(tuned, other) - before == pytest.approx(expected, abs=1e-6) != 0
    assert not list(folder.glob("runs/full-*/adapter"))


def test_answers_for_a_judge(smoke):
    found, folder = smoke("instruction")
    for run in found.runs:
        (file,) = folder.glob(f"runs/*-{run.id}/answers/model_answer.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["question_id"] for line in lines] == [81, 82]
        assert all(len(line["choices"][0]["turns"]) == 2 for line in lines)
        assert {line["model_id"] for line in lines} == {run.name}
        assert len({line["answer_id"] for line in lines}) == 2


def test_figures_of_a_recipe(smoke):
    pytest.importorskip("matplotlib")
    _, folder = smoke("instruction")
    drawn = {file.name for file in (folder / "figures").iterdir()}
    assert drawn == {f"learned_and_{name}.{form}" for name in ("forgetting", "kl") for form in ("png", "svg")}


def test_projections_train_the_same_number_of_parameters(smoke):
    found, _ = smoke("projections")
    assert {run.rows[0]["trained"] for run in found.runs} == {2048} and len(found.runs) == 11


def test_the_command(tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "save_figures", lambda figures, folder: [])
    options = [
        "--method",
        "s2ft",
        "--seeds",
        "0",
        "--set",
        "tests=BoolQ",
        "validation_rows=0",
        "eval_steps=null",
        "best=false",
    ]
    arguments = ["reproduce", "commonsense", "--smoke", *options]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Commonsense reasoning" in printed and "Published:" in printed and "its numbers mean nothing" in printed
    (file,) = tmp_path.glob("reproduce-commonsense-smoke/runs/*/run.json")
    assert json.loads(file.read_text())["command"].startswith("s2ft reproduce commonsense --smoke --method s2ft")
    caplog.set_level(logging.INFO)
    assert main([*arguments, "--resume"]) == 0 and "has a result" in caplog.text
    assert main(arguments) == 2 and "--resume goes on there" in capsys.readouterr().err
