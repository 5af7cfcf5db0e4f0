"""The comparison of methods: frozen families, the plan of its runs, one run on a tiny model, and its report."""

import re

import pytest
import torch
import yaml

from bench.evidence import families, report, run, tasks, work
from s2ft.reproduce.smoke import smoke_model
from s2ft.text.models import load_model
from s2ft.text.prompts import PromptFormat
from s2ft.train.problems import TRAIN_TEMPLATES, make_problems


@pytest.fixture
def results(tmp_path):
    return run.Results(tmp_path / "runs")


@pytest.fixture
def config():
    return yaml.safe_load(run.CONFIG.read_text(encoding="utf-8"))


# ---- held-out families ---------------------------------------------------------------------------------


def test_families_are_those_that_were_frozen():
    families.check_frozen()


@pytest.mark.parametrize("side", ["FAMILIES", "TRAIN_TEMPLATES"])
def test_a_changed_template_is_noticed(side, monkeypatch):
    changed = {name: (*texts[:-1], texts[-1] + " ") for name, texts in getattr(families, side).items()}
    monkeypatch.setattr(families, side, changed)
    with pytest.raises(ValueError, match="changed since they were frozen"):
        families.check_frozen()


def test_held_out_problems_share_no_template_and_no_numbers_with_training_problems():
    held_out, train = families.held_out_problems(400), make_problems(2000, held_out=False)
    assert not {one["template"] for one in held_out} & {text for texts in TRAIN_TEMPLATES.values() for text in texts}
    numbers = {tuple(sorted(one["numbers"])) for one in train}
    assert not {tuple(sorted(one["numbers"])) for one in held_out} & numbers


def test_answers_of_held_out_problems_are_right():
    for problem in families.held_out_problems(200):
        for left, sign, right, result in re.findall(r"(\d+) ([+*/-]) (\d+) = (\d+)", problem["output"]):
            assert eval(f"{left} {sign} {right}") == int(result)
        assert problem["output"].endswith(f"The answer is {problem['answer']}.")
        a, b, c = problem["numbers"]
        assert all(re.search(rf"\b{number}\b", problem["instruction"]) for number in (a, b, c))


# ---- the plan ------------------------------------------------------------------------------------------


def write(results, config, one, validation, forgetting=0.1, **more):
    settings = run.settings_of(one, config)
    result = {
        "name": one.name, "digest": run.digest(settings), "settings": settings, "validation": validation,
        "test": validation / 2, "near": {"MultiArith": 0.25}, "kl": 1.0,
        "forgetting": {"encyclopedia": forgetting, "documentation": 0.2}, "seconds": 10.0, "seconds_per_step": 1.0,
        "peak_bytes": 2**30, "trainable": 10**6, "machine": {"processor": "test"}, **more,
    }  # fmt: skip
    results.write(result)


def test_the_sweep_has_every_rate_of_every_row_once(config):
    runs = run.sweep_runs(config, list(config["rows"]))
    assert len(set(runs)) == len(runs) == sum(len(row.get("rates", [])) for row in config["rows"].values())
    for name, row in config["rows"].items():
        assert row.get("screened") or row.get("rate_of") or len(row["rates"]) == 4, name


def test_validation_accuracy_chooses_the_rate_and_forgetting_breaks_ties(config, results):
    rates = config["rows"]["lora"]["rates"]
    for rate, validation, forgetting in zip(rates, (0.5, 0.7, 0.7, 0.6), (0.0, 0.3, 0.2, 0.0)):
        assert run.best_rate("lora", config, results) is None  # a rate is missing
        write(results, config, run.Run("lora", config["sweep"], rate, 0), validation, forgetting)
    assert run.best_rate("lora", config, results) == rates[2]
    assert run.best_rate("lora-bf16", config, results) == rates[2]


def test_later_runs_are_of_complete_rows_and_all_seeds_and_tasks(config, results):
    for rate in config["rows"]["rslora"]["rates"]:
        write(results, config, run.Run("rslora", config["sweep"], rate, 0), 0.5, rate)
    for row in ("s2ft-weight", "lora"):  # one is screened only, the other is not complete
        write(results, config, run.Run(row, config["sweep"], config["rows"][row]["rates"][0], 0), 0.5)
    runs = [one for one in run.later_runs(config, list(config["rows"]), results) if one.row != run.BASE]
    best = config["rows"]["rslora"]["rates"][0]
    assert set(runs) == {run.Run("rslora", task, best, seed) for task in config["tasks"] for seed in config["seeds"]}
    config["rows"]["rslora"]["tasks"] = ["subjects"]
    runs = run.later_runs(config, ["rslora"], results)
    assert {one.task for one in runs if one.row == "rslora"} == {config["sweep"], "subjects"}


def test_a_run_with_other_settings_or_an_error_is_run_again(config, results):
    one = run.Run("lora", config["sweep"], config["rows"]["lora"]["rates"][0], 0)
    assert results.get(one, config) is None
    write(results, config, one, 0.5)
    assert results.get(one, config)["validation"] == 0.5
    assert results.get(one, {**config, "batch_size": 4}) is None
    write(results, config, one, 0.5, error="MemoryError")
    assert results.get(one, config) is None


# ---- the report ----------------------------------------------------------------------------------------


def test_the_report_compares_the_best_rows_and_shows_what_is_missing(config, results, tmp_path):
    for row, accuracy in (("s2ft-d", 0.4), ("lora", 0.6)):
        for rate in config["rows"][row]["rates"]:
            write(results, config, run.Run(row, config["sweep"], rate, 0), accuracy, rate)
        for seed in config["seeds"][1:]:
            best = run.best_rate(row, config, results)
            write(results, config, run.Run(row, config["sweep"], best, seed), accuracy + seed / 100)
    for one in run.cost_runs(config, ["s2ft-d", "lora"]):
        write(results, config, one, 0.0)
    page = report.write_report(config, results, tmp_path, tmp_path).read_text()
    assert "| S²FT, d | 20.5 ± 0.5 |" in page and "| -10.0 | below |" in page
    assert "accuracy within a limit of forgetting" in page and "| LoRA, float32 adapters | 30.0 | 30.0 | 30.0 |" in page
    assert "not run" in page and "Fewer seeds are there of" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"evidence-forgetting.png", "evidence-memory.png"}
    committed = run.Results(tmp_path / "runs.jsonl")  # the tables can be made again from one file
    assert report.write_report(config, committed, tmp_path / "again", tmp_path).read_text() == page
    found = report.Report(config, results)
    assert found.best_of("s2ft", config["sweep"]) == "s2ft-d" and found.best_of("s2ft", "subjects") is None


# ---- one run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A worker whose model and texts are tiny."""
    config = {
        "model": "tiny", "dtype": "float32", "parameters": 2000, "batch_size": 4, "warmup": 1, "calibration": 4,
        "sweep": "arithmetic", "questions": {"train": 8, "validation": 2, "test": 2, "near": 0}, "kl_prompts": 2,
    }  # fmt: skip
    model, tokenizer = load_model(smoke_model(tmp_path_factory.mktemp("tiny")))
    prompt = PromptFormat(template=work.TEMPLATE)
    prompt.apply_to(tokenizer)
    texts = work._text_rows(tokenizer, ["The lamp stands on the table."])
    probes = {name: texts for name in ("encyclopedia", "documentation", "protected")}
    work.SHARED.update(
        config=config, model=model.eval(), tokenizer=tokenizer, prompt=prompt, kl={}, tasks={}, probes=probes, near={},
        base_loss={"encyclopedia": work.mean_loss(model, texts), "documentation": 0.0},
    )  # fmt: skip
    yield config
    work.SHARED.clear()


ROWS = {
    "s2ft": {"method": "s2ft", "options": {"d_ratio": 0.1}},
    "calibrated": {"method": "s2ft", "options": {"d_ratio": 0.1, "selection": "activation"}},
    "candidate": {"method": "s2ft", "options": {"d_ratio": 0.1, "selection": "shielded"}},
    "protected": {"method": "s2ft", "options": {"d_ratio": 0.1, "protect_ratio": 0.5}, "protect": True},
    "phases": {"method": "s2ft", "options": {"d_ratio": 0.1}, "phases": 2},
    "miss": {"method": "miss"},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("row", ROWS)
def test_a_run_measures_a_trained_model_and_leaves_the_base(row, shared):
    before = {name: value.clone() for name, value in work.SHARED["model"].state_dict().items()}
    found = work.run("arithmetic", {**shared, **ROWS[row], "steps": 4, "rate": 0.1, "seed": 0})
    assert len(found["losses"]) == 4 and found["losses"][-1] != found["losses"][0]
    assert found["forgetting"]["encyclopedia"] != 0 and found["kl"] > 0
    assert row == "full" or 0 < found["trainable"] <= shared["parameters"]
    assert found["seconds"] > 0 and found["machine"]["torch"] == torch.__version__
    after = work.SHARED["model"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_costs_are_measured_without_scores(shared):
    found = work.run(run.COSTS, {**shared, **ROWS["s2ft"], "steps": 2, "rate": 1e-4, "seed": 0})
    assert found["seconds_per_step"] > 0 and found["peak_bytes"] >= 0 and "test" not in found


def test_the_base_has_no_forgetting(shared):
    found = work.run("arithmetic", {**shared, "method": run.BASE})
    assert found["forgetting"]["encyclopedia"] == 0 and found["kl"] == 0 and "trainable" not in found


@pytest.mark.parametrize(
    ("text", "right"), [("Mother-in-law.", True), ("mother-in-law", True), ("mother", False), ("a, b", False)]
)
def test_words_are_compared_without_case_and_marks(text, right):
    assert tasks.same_words(tasks.Question("", "mother-in-law", "mother-in-law"), text) == right
