"""s2ft eval: suites as tables in each form, resume, likelihood, and options that are refused before a model is loaded."""

import csv
import io
import json
import shutil

import pytest
import torch
from train.tiny import save_tiny, sums, tiny_model, write_jsonl

import s2ft
from s2ft.cli.main import main

QUESTION = "Is {} + 3 = 5?\n\nAnswer format: true/false"


def save_trained(folder, std):
    """Save an adapter with random values."""
    model = tiny_model()
    s2ft.attach(model, s2ft.S2FTConfig(d_ratio=0.25, o_ratio=0.25), name="mine")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    s2ft.save_adapter(model, folder)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, an adapter, and a folder with two tasks of the paper and one that lists its answers."""
    work = tmp_path_factory.mktemp("eval")
    save_tiny(work / "model")
    save_trained(work / "adapter", 0.5)
    (work / "dataset").mkdir()
    for name, rows in {
        "AddSub": sums(5),
        "boolq": [{"instruction": QUESTION.format(n), "output": "", "answer": str(n == 2).lower()} for n in range(5)],
    }.items():
        (work / "dataset" / name).mkdir()
        (work / "dataset" / name / "test.json").write_text(json.dumps(rows))
    write_jsonl(work / "colours.jsonl", [{"question": "?", "choices": ["red", "blue"], "answer": n} for n in (0, 1)])
    (work / "mine.yaml").write_text("tasks: [{file: colours.jsonl, task: choices, name: Colours}]")
    return work


def evaluate(work, *words, status=0):
    assert main(["eval", "--model", str(work / "model"), "--max-new-tokens", "6", *map(str, words)]) == status


SUITE = ("--suite", "arithmetic", "boolq", "--skip-missing", "--limit", 3)


def test_a_suite_is_a_table_with_the_average(work, capsys, caplog):
    evaluate(work, *SUITE, "--suite", work / "mine.yaml", "--data", work)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["task", "AddSub", "BoolQ", "Colours", "average"]
    assert lines[4].split()[:4] == ["Colours", "50.0", "1", "2"] and "8 rows in" in lines[6]
    assert lines[7] == (
        "not in the average, because there are no rows of them: MultiArith, GSM8K, AQuA, SingleEq, SVAMP, MAWPS"
    )
    assert "has no rows of MultiArith" in caplog.text


@pytest.mark.parametrize(
    "name, start", [("t.md", "**arithmetic boolq"), ("t.tex", "\\begin{table}"), ("t.txt", "arithmetic boolq"), ("t.csv", "task,")]
)  # fmt: skip
def test_the_form_follows_from_the_name_of_the_file(name, start, work, tmp_path, capsys):
    evaluate(work, *SUITE, "--data", work, "--output", tmp_path / name)
    text, scores = (tmp_path / name).read_text(), json.loads((tmp_path / "t.json").read_text())
    assert text.startswith(start) and text.endswith("\n")
    assert [task["name"] for task in scores["tasks"]] == ["AddSub", "BoolQ"] and len(scores["tasks"][0]["records"]) == 3
    assert scores["average"] == sum(task["accuracy"] for task in scores["tasks"]) / 2 and "GSM8K" in scores["missing"]
    if name == "t.csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [row["task"] for row in rows] == ["AddSub", "BoolQ", "average"]
        assert float(rows[2]["accuracy"]) == 100 * scores["average"]


def test_a_suite_is_continued(work, tmp_path, monkeypatch, capsys):
    """What was scored before an interrupt is not scored again, and the end is the same."""
    command = (*SUITE, "--data", work, "--adapter", work / "adapter", "--num-beams", 2, "--output", tmp_path / "s.json")
    evaluate(work, *command[:-1], tmp_path / "whole.json")
    from s2ft.text import suites

    one, done = suites.evaluate_task, []

    def stop_at_the_second(model, prompter, loaded, **settings):
        if done:
            raise KeyboardInterrupt
        done.append(loaded.task.name)
        return one(model, prompter, loaded, **settings)

    monkeypatch.setattr(suites, "evaluate_task", stop_at_the_second)
    evaluate(work, *command, status=130)
    capsys.readouterr()
    evaluate(work, *command, status=2)
    assert "exists" in capsys.readouterr().err
    evaluate(work, *command, "--resume", "--num-beams", 3, status=2)
    assert "num_beams was 2, is 3" in capsys.readouterr().err
    done.clear()
    monkeypatch.setattr(suites, "evaluate_task", lambda *a, **s: done.append(a[2].task.name) or one(*a, **s))
    evaluate(work, *command, "--resume", "--batch-size", 2)
    assert done == ["BoolQ"]
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "s.json"))
    for scores in (first, second):
        for task in scores["tasks"]:
            del task["seconds"]
    assert first == second


def test_another_adapter_under_the_same_name_is_not_continued(work, tmp_path, capsys):
    save_trained(tmp_path / "adapter", 0.5)
    command = (*SUITE, "--data", work, "--adapter", tmp_path / "adapter", "--output", tmp_path / "s.json")
    evaluate(work, *command)
    shutil.rmtree(tmp_path / "adapter")
    save_trained(tmp_path / "adapter", 0.4)
    evaluate(work, *command, "--resume", status=2)
    assert "the model or the adapter was changed" in capsys.readouterr().err


def test_likelihood_of_a_suite_and_of_a_file(work, tmp_path, capsys):
    evaluate(work, "--suite", "boolq", "--data", work, "--scoring", "likelihood", "--output", tmp_path / "s.json")
    (task,) = json.loads((tmp_path / "s.json").read_text())["tasks"]
    file = work / "dataset/boolq/test.json"
    evaluate(work, "--data", file, "--task", "commonsense", "--scoring", "likelihood", "--output", tmp_path / "f.json")
    single = json.loads((tmp_path / "f.json").read_text())
    assert single["records"] == task["records"] and task["records"][0]["logprobs"].keys() == {"true", "false"}
    evaluate(work, "--data", work / "colours.jsonl", "--task", "choices", "--length-normalized")
    assert "50.0% right (1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "missing: --data FILE_OR_NAME, --task, or --suite, or --lm-eval"),
        (["--data", "x"], "missing: --task"),
        (["--data", "x", "--task", "arithmetic", "--resume"], "resume has no meaning with data without suite"),
        (
            ["--data", "x", "--task", "arithmetic", "--num-fewshot", "1"],
            "num_fewshot has no meaning with data or suite",
        ),
        (["--suite", "boolq", "--resume"], "resume needs output"),
        (["--suite", "boolq", "--scoring", "likelihood", "--num-beams", "2"], "so it takes no num_beams"),
        (["--data", "x", "--task", "choices", "--num-beams", "2"], "so it takes no num_beams"),
        (["--suite", "boolq", "--scoring", "generation", "--length-normalized"], "length_normalized has no meaning"),
        (["--suite", "boolq", "--answer-form", "so"], "answer_form must have {} once"),
        (["--suite", "boolq", "--num-beams", "0"], "num_beams must be at least 1"),
        (["--lm-eval", "arc_easy", "--data", "x"], "data has no meaning with lm_eval"),
        (["--lm-eval", "arc_easy", "--num-beams", "2"], "num_beams has no meaning with lm_eval"),
        (["--lm-eval", "arc_easy", "--split", "test"], "split, field and skip_bad_rows have no meaning with lm_eval"),
    ],
)
def test_options_that_contradict_each_other(words, message, capsys):
    assert main(["eval", "--model", "nosuch", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--suite", "arithmetic", "--data", "WORK"], "has no test rows of MultiArith, GSM8K, AQuA"),
        (["--suite", "arithmetic"], "give the folder with them by --data"),
        (["--suite", "poetry"], "'poetry' is neither a suite"),
        (["--suite", "boolq", "--data", "WORK", "WORK"], "data must be one folder with --suite"),
        (["--suite", "boolq", "--data", "WORK", "--output", "WORK/t.doc"], "output must end in .json, .txt, .csv"),
        (["--suite", "addsub", "--data", "WORK", "--scoring", "likelihood"], "is a number, so there are no allowed"),
        (["--suite", "WORK/mine.yaml", "--scoring", "generation"], "task Colours has the kind choices"),
        (["--data", "WORK/colours.jsonl", "--task", "choices", "--scoring", "generation"], "has the kind choices"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(words, message, work, monkeypatch, capsys):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("s2ft.text.adapter_prompts.load_with_adapter", load)
    evaluate(work, *(word.replace("WORK", str(work)) for word in words), status=2)
    assert message in capsys.readouterr().err


def test_lm_eval_is_named_where_it_is_missing(work, monkeypatch, capsys):
    monkeypatch.setattr("s2ft.packages.is_installed", lambda package: package != "lm-eval")
    evaluate(work, "--lm-eval", "arc_easy", status=2)
    assert "s2ft eval --lm-eval needs the package lm-eval, which is not installed: pip install lm-eval" in (
        capsys.readouterr().err
    )


def test_memory_of_beams_is_counted(work, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", fails)
    evaluate(work, "--suite", "boolq", "--data", work, "--num-beams", 4, status=1)
    printed = capsys.readouterr().err
    assert "--num-beams 1: " in printed and "the answers are then greedy" in printed
    evaluate(work, "--suite", "boolq", "--data", work, "--scoring", "likelihood", status=1)
    printed = capsys.readouterr().err
    assert "--batch-size 8" in printed and "keys and values" not in printed and "max-new-tokens" not in printed
