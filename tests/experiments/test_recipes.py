"""Every recipe runs on a tiny model, and mistakes are found before anything is trained."""

import json

import pytest
from support.inside import load_model
from support.pairs import rest_slow

import s2ft
from bench.experiments import __main__ as command, comparison
from bench.experiments.comparison_report import figures, tables
from bench.experiments.printing import Spread
from bench.experiments.runner import Results

QUICK = ("fusion", "small-sequence", "serving")  # the others take longer
RECIPES = sorted(file.stem for file in command.RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", rest_slow(RECIPES, QUICK))
def test_a_smoke_run_of_every_recipe(name, tmp_path, capsys):
    assert command.main([name, "--smoke", "--workers", "0", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "failed" not in printed and "not run" not in printed and "**" in printed
    lines = [json.loads(line) for line in (tmp_path / f"{name}-smoke.jsonl").read_text().splitlines()]
    assert lines and all(line["status"] == "done" and line["rows"] for line in lines)
    if name == "commonsense":
        assert all(line["rows"][0]["best_step"] in (1, 2) and len(line["rows"][0]["tests"]) == 8 for line in lines)
        answers = next(tmp_path.glob("runs/lora*/answers/boolq.jsonl")).read_text().splitlines()
        assert [json.loads(line) for line in answers][0].keys() == {"question", "generated", "right"}
        model, _ = load_model(str(tmp_path / "smoke" / "model"))
        s2ft.load_adapter(model, str(next(tmp_path.glob("runs/s2ft*/adapter"))))  # what was trained can be used
        assert next(tmp_path.glob("runs/lora*/adapter/adapter_model.safetensors")).is_file()
    assert command.main([name, "--smoke", "--workers", "0", "--output", str(tmp_path)]) == 0  # nothing is made again
    assert len((tmp_path / f"{name}-smoke.jsonl").read_text().splitlines()) == len(lines)


# ---- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["comonsense"], "did you mean commonsense"),
        (["nosuch.yaml"], "doesn't exist"),
        (["commonsense"], "--data names the folder"),
        (["commonsense", "--data", "nosuch"], "there is no file nosuch"),
        (["arithmetic", "--smoke", "--set", "rates"], "--set must be NAME=VALUE"),
        (["arithmetic", "--smoke", "--set", "beam=1"], "there is no 'beam'; did you mean beams"),
        (["arithmetic", "--smoke", "--set", "seeds=[]"], "seeds must be a list with at least one value"),
        (["arithmetic", "--smoke", "--set", "tasks=[math]"], "there is no 'math'"),
        (["arithmetic", "--smoke", "--set", "best=true"], "best needs held-out rows"),
        (["arithmetic", "--smoke", "--set", "answer_within=0.1"], "answer_within needs scales"),
        (["evidence", "--smoke", "--set", "questions.validation=0"], "scales need forgetting and a validation loss"),
        (["evidence", "--smoke", "--set", "rows.s2ft.rates={subjects: [1]}"], "rates must be positive on arithmetic"),
        (["arithmetic", "--smoke", "--set", "rows.s2ft.rates=[0]"], "row s2ft: rates must be positive"),
        (["arithmetic", "--smoke", "--set", "rows.s2ft.options.d_raito=0.1"], "row s2ft: an option of method s2ft"),
        (["arithmetic", "--smoke", "--set", "rows.s2ft.options.d_ratio=0.001"], "row s2ft: d_ratio=0.001"),
        (["arithmetic", "--smoke", "--set", "rows.dora.options.rank=3"], "row dora: method dora does not take an option"),
        (["arithmetic", "--smoke", "--set", "rows.dora.method=dorra"], "there is no 'dorra'; did you mean dora"),
        (["arithmetic", "--smoke", "--set", "rows.dora.option=1"], "there is no 'option'; did you mean options"),
        (["arithmetic", "--smoke", "--set", "rows.dora=3"], "row dora: must hold lines"),
        (["arithmetic", "--smoke", "--only", "galore"], "there is no 'galore'"),
        (["arithmetic", "--smoke", "--part", "3/2"], "--part must be K/N"),
        (["projections", "--smoke", "--set", "equal_to=dd"], "equal_to: there is no 'dd'"),
        (["frontier", "--smoke", "--set", "rows.s2ft.trial.muom=1"], "there is no 'muom'; did you mean muon"),
        (["efficiency", "--smoke", "--set", "model.max_position_embeddings=4"], "lengths must be at most 4"),
        (["serving", "--smoke", "--set", "widths=[65]"], "widths multiples of 64"),
        (["serving", "--smoke", "--set", "channels=999"], "channels must be at most"),
        (["fusion", "--smoke", "--set", "weights=[[1,0]]"], "weights must be pairs without 0"),
        (["fusion", "--smoke", "--set", "rows.lora.rates={}"], "row lora: rates must have a rate for boolq"),
        (["sequence", "--smoke", "--set", "rows.lora.mode=on_top"], "mode on_top needs method s2ft"),
        (["sequence", "--smoke", "--set", "rows.s2ft-disjoint.options.d_ratio=0.6"], "disjoint units need ratios of at most"),
        (["metamath", "--smoke", "--set", "query=x"], "query must contain {query}"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_a_run(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.runner, "make", lambda *arguments, **options: pytest.fail("a run began"))
    with pytest.raises(SystemExit):
        command.main([*words, "--output", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_recipe_of_ones_own_and_its_plan(tmp_path, monkeypatch, capsys):
    from bench.experiments.smoke import smoke_model

    (tmp_path / "mine.jsonl").write_text('{"question": "2+3=", "answer": "5"}\n')
    (tmp_path / "mine.yaml").write_text(f"""
        kind: comparison
        title: Mine
        settings: {{model: {smoke_model(tmp_path / "model")}, dtype: float32, data: {tmp_path}, train: mine.jsonl,
                    tests: [mine.jsonl], questions: {{}}, training: {{max_steps: 1}}}}
        tasks: [files]
        seeds: [0, 1]
        rows: {{s2ft: {{method: s2ft, options: {{d_ratio: 0.5}}}}}}
        rates: [5.0e-4]
    """)
    assert command.main([str(tmp_path / "mine.yaml"), "--plan", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "s2ft-files-0.0005-1: to be made"
    assert not (tmp_path / "out").exists()
    assert command.main(["--list"]) == 0 and "small-sequence: " in capsys.readouterr().out


# ---- the plan of a comparison ----------------------------------------------------------------------------


def test_a_longer_row_makes_more_updates_and_costs_as_many():
    recipe = command.read("frontier")
    runs = [comparison.run_of(recipe, "s2ft-d3-time", task, 0.001, 0) for task in ("subjects", comparison.COSTS)]
    assert [one.settings["training"]["max_steps"] for one in runs] == [19, recipe["steps"]["costs"]]


def test_the_loss_within_a_limit_and_its_interval_lie_on_the_curve_that_validation_chooses(tmp_path):
    recipe = command.read("evidence")
    recipe["rows"] = {row: {**recipe["rows"][row], "rates": [0.1, 0.2]} for row in ("s2ft", "lora")}
    results = Results(tmp_path / "r.jsonl")

    def add(row, rate, points, right):
        names = ("forgetting", "validation", "test", "scale", "each", "tokens")
        scaled = [dict(zip(names, [*point, [1, 1]])) for point in [(0.0, 5.0, 5.0, 0.0, [5.0, 5.0]), *points]]
        done = {"status": "done", "rows": [{"scaled": scaled, "tests": {"test": right}}]}
        results.add({"digest": comparison.run_of(recipe, row, "subjects", rate, 0).digest, **done})

    add("s2ft", 0.1, [(-0.02, 2.0, 2.5, 0.5, [2.0, 3.0]), (0.04, 1.0, 1.5, 1.0, [0.5, 2.5])], 0.5)
    add("s2ft", 0.2, [(0.06, 0.8, 0.9, 1.0, [0.9, 0.9])], 0.75)  # at 0.05 this line is at 1.5
    add("lora", 0.1, [(0.1, 1.0, 2.0, 1.0, [1.0, 3.0])], 0.25)  # at 0.05 its questions are at 3 and 4
    (frontier,) = [table for table in tables(recipe, results) if table.name == "subjects-frontier"]
    assert [[cell.mean for cell in row if isinstance(cell, Spread)] for row in frontier.rows] == [
        pytest.approx([2.0, 1.5, 0.9, 0.9, 1.0, 50.0, -2.0, -2.5, -1.5]),
        pytest.approx([4.7, 3.5, 2.0, 2.0, 3.0, 25.0]),
    ]
    alone = {**recipe, "rows": {"s2ft": recipe["rows"]["s2ft"]}}  # without LoRA there is nothing to compare with
    assert [len(table.columns) for table in tables(alone, results) if table.name == frontier.name] == [8]
    assert [[(line.x[-1], line.y[-1]) for line in figure.series] for figure in figures(recipe, results)] == [
        [],
        [],
        [(0.04, 1.5), (0.06, 0.9), (0.1, 2.0)],
    ]
