"""Suites: where the files of tasks are found, the tasks of a YAML file, and the file of scores that can be continued."""

import json
import shutil

import pytest
import torch
import yaml
from train.tiny import sums, tiny_model, tiny_tokenizer, write_jsonl

from s2ft.text import suites
from s2ft.text.adapter_prompts import Prompter
from s2ft.text.scores_file import ScoresFile, rows_digest, weights_digest
from s2ft.text.suites import PAPER, SuiteTask, TaskResult, average, find_suite, load_suite, missing_tasks, score_suite

# The names that LLM-Adapters has, for the tasks in the paper's order.
FOLDERS = {
    "arithmetic": "MultiArith gsm8k AddSub AQuA SingleEq SVAMP mawps".split(),
    "commonsense": "boolq piqa social_i_qa hellaswag winogrande ARC-Easy ARC-Challenge openbookqa".split(),
}
YES = {"instruction": "Is 2+3=5?\n\nAnswer format: true/false", "output": "", "answer": "true"}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize("suite", PAPER)
def test_tasks_are_found_in_a_checkout_of_llm_adapters(suite, tmp_path):
    for name in FOLDERS[suite]:
        write_rows(tmp_path / "dataset" / name / "test.json", [YES])
        write_rows(tmp_path / "dataset" / name / "train.json", [YES])
    found = find_suite([suite.upper()], tmp_path)
    assert [task.name for task in found] == list(PAPER[suite])
    files = [str(tmp_path / "dataset" / name / "test.json") for name in FOLDERS[suite]]
    assert [task.data for task in found] == files and {task.kind for task in found} == {suite}


@pytest.mark.parametrize(
    "name", ["boolq.test.jsonl", "BoolQ.json", "BOOLQ/test.jsonl", "boolq_test.json", "commonsense/boolq.test.parquet",
             "commonsense/boolq-test.csv", "boolq/test.json.gz"]
)  # fmt: skip
def test_layouts_of_a_folder(name, tmp_path):
    write_rows(tmp_path / name, [YES])
    write_rows(tmp_path / "boolq.train.jsonl", [YES])
    write_rows(tmp_path / "ARC-Easy.validation.jsonl", [YES])
    assert find_suite(["boolq"], tmp_path) == [SuiteTask("BoolQ", "commonsense", str(tmp_path / name))]
    assert [task.name for task in find_suite(["arc_e"], tmp_path, split="validation")] == ["ARC-e"]


def test_missing_tasks_are_named(tmp_path):
    write_rows(tmp_path / "mawps.train.jsonl", [YES])
    write_rows(tmp_path / "AddSub.test.jsonl", [YES])
    with pytest.raises(FileNotFoundError, match=r"no test rows of MultiArith, GSM8K, AQuA, .*--skip-missing"):
        find_suite(["arithmetic"], tmp_path)
    found = find_suite(["arithmetic"], tmp_path, skip_missing=True)
    assert [task.name for task in found] == ["AddSub"] and "MAWPS" in missing_tasks(["arithmetic"], found)
    with pytest.raises(FileNotFoundError, match="no test rows of BoolQ"):
        find_suite(["boolq"], tmp_path, skip_missing=True)


def test_tasks_and_files_in_one_suite(tmp_path):
    write_rows(tmp_path / "AddSub.test.jsonl", [YES])
    own = write_jsonl(tmp_path / "mine.jsonl", sums(2))
    found = find_suite(["addsub", str(own)], tmp_path, kind="arithmetic")
    assert [(task.name, task.kind) for task in found] == [("AddSub", "arithmetic"), ("mine", "arithmetic")]


@pytest.mark.parametrize(
    "words, settings, kind, message",
    [
        ([], {}, ValueError, "no suite was given"),
        (["boolq"], {}, ValueError, "give the folder with them by --data"),
        (["boolq"], {"folder": "nowhere"}, FileNotFoundError, "data nowhere is no folder"),
        (["poetry"], {}, FileNotFoundError, "'poetry' is neither a suite"),
        (["mine.jsonl"], {}, ValueError, "give --task"),
        (["none.yaml"], {}, FileNotFoundError, "none.yaml"),
        (["mine.jsonl", "other/mine.jsonl"], {"kind": "arithmetic"}, ValueError, "two tasks have the name mine"),
    ],
)
def test_words_that_are_no_suite(words, settings, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(write_jsonl(tmp_path / "mine.jsonl", sums(2)), "other")
    with pytest.raises(kind, match=message):
        find_suite(words, **settings)


def test_several_files_of_a_task_are_an_error(tmp_path):
    for name in ("boolq.test.jsonl", "BoolQ.json"):
        write_rows(tmp_path / name, [YES])
    with pytest.raises(ValueError, match="BoolQ has several files: .*BoolQ.json, .*boolq.test.jsonl"):
        find_suite(["boolq"], tmp_path)


# ---- YAML files ----------------------------------------------------------------------------------------


def test_a_yaml_file_lists_tasks(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", sums(2))
    tasks = [{"file": "mine.jsonl", "task": "arithmetic"}, {"name": "again", "file": "mine.jsonl", "task": "choices"}]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    file = str(tmp_path / "mine.jsonl")
    expected = [SuiteTask("mine", "arithmetic", file), SuiteTask("again", "choices", file)]
    assert find_suite([str(tmp_path / "s.yaml")]) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "can't be read as YAML"),
        ("- a", "must have a list 'tasks'"),
        ("tasks: []", "must have a list 'tasks'"),
        ("tasks: [{task: arithmetic}]", "task 1 needs 'file'"),
        ("tasks: [{file: mine.jsonl}]", "task 1: task must be one of arithmetic, commonsense, choices, got None"),
        ("tasks: [{file: mine.jsonl, task: choices, kind: x}]", "unknown key 'kind'"),
        ("tasks: [{file: none.jsonl, task: choices}]", "none.jsonl doesn't exist"),
    ],
)
def test_a_yaml_file_without_tasks(text, message, tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", sums(2))
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_suite([str(tmp_path / "s.yaml")])


# ---- reading and scoring -------------------------------------------------------------------------------


@pytest.fixture
def suite(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", sums(3))
    write_jsonl(tmp_path / "yes.jsonl", [YES] * 2)
    rows = [{"question": "Which?", "choices": ["red", "blue"], "answer": n} for n in (0, 1)]
    write_jsonl(tmp_path / "colours.jsonl", rows)
    kinds = {"mine": "arithmetic", "yes": "commonsense", "colours": "choices"}
    return [SuiteTask(name, kind, str(tmp_path / f"{name}.jsonl")) for name, kind in kinds.items()]


def test_each_task_is_scored_by_its_kind_and_results_come_one_by_one(suite):
    seen = []
    arguments = (tiny_model(), Prompter(tiny_tokenizer()), load_suite(suite))
    results = score_suite(*arguments, max_new_tokens=4, batch_size=2, on_result=lambda one: seen.append(one.name))
    assert [(one.name, one.of) for one in results] == [("mine", 3), ("yes", 2), ("colours", 2)]
    assert seen == ["mine", "yes", "colours"] and average(results) == sum(one.accuracy for one in results) / 3
    assert "logprobs" in results[2].records[0] and "logprobs" not in results[0].records[0]
    assert results[2].accuracy == 0.5  # the same question with each answer as the right one


def test_settings_reach_the_generation(suite, monkeypatch):
    calls = []
    monkeypatch.setattr("s2ft.text.evaluation.generate", lambda *arguments: calls.append(arguments[3:]) or ["5"] * 3)
    score_suite(
        tiny_model(), Prompter(tiny_tokenizer()), load_suite(suite[:1]), num_beams=4, batch_size=7, max_new_tokens=9
    )
    assert calls == [(7, 9, "mine", 4)]


def test_rows_that_can_not_be_scored_are_found_before_a_model_is_there(suite, tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [*sums(1), {"instruction": "q", "output": "none"}])
    with pytest.raises(ValueError, match="mine.jsonl, example 2: 'none' has no number"):
        load_suite(suite)
    with pytest.raises(ValueError, match="mine.jsonl, example 1: the answer '0' of task arithmetic is a number"):
        load_suite(suite, scoring="likelihood")
    with pytest.raises(ValueError, match="task colours has the kind choices"):
        load_suite(suite, scoring="generation")
    with pytest.raises(ValueError, match="scoring must be one of generation, likelihood, got 'luck'"):
        load_suite(suite, scoring="luck")


def test_limit_is_per_task(suite):
    assert [len(one.examples) for one in load_suite(suite, limit=1)] == [1, 1, 1]


# ---- the file of scores --------------------------------------------------------------------------------


def result(name="a", accuracy=0.5):
    return TaskResult(name, accuracy, 1, 2, 0, 1.5, ({"question": "ü", "right": True},))


def test_scores_are_continued_and_not_repeated(suite, tmp_path, monkeypatch):
    loaded, model, prompter = load_suite(suite), tiny_model(), Prompter(tiny_tokenizer())
    options = {"rows": rows_digest(loaded), "beams": 1}
    first = ScoresFile(tmp_path / "s.json", options)

    def stop_after_two(one):
        first.add(one)
        if len(first.results) == 2:
            raise KeyboardInterrupt

    first.check_weights(model)
    with pytest.raises(KeyboardInterrupt):
        score_suite(model, prompter, loaded, max_new_tokens=4, on_result=stop_after_two)
    again = ScoresFile(tmp_path / "s.json", options)
    again.resume()
    again.check_weights(model)
    scored, evaluate_task = [], suites.evaluate_task

    def record(model, prompter, one, **settings):
        scored.append(one.task.name)
        return evaluate_task(model, prompter, one, **settings)

    monkeypatch.setattr(suites, "evaluate_task", record)
    results = score_suite(model, prompter, loaded, max_new_tokens=4, done=again.results, on_result=again.add)
    assert scored == ["colours"] and results[:2] == list(first.results.values())
    assert [task["name"] for task in json.loads((tmp_path / "s.json").read_text())["tasks"]] == [t.name for t in suite]


def test_changed_options_are_refused(tmp_path):
    path = tmp_path / "s.json"
    ScoresFile(path, {"beams": 4, "rows": {"a": "1"}}).add(result())
    for options, message in (
        ({"beams": 1, "rows": {"a": "1"}}, "beams was 4, is 1"),
        ({"beams": 4, "rows": {"a": "2"}}, 'rows was {"a": "1"}, is {"a": "2"}'),
        ({"beams": 4, "rows": {"a": "1"}, "new": 1}, "new was null, is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoresFile(path, options).resume()
    same = ScoresFile(path, {"beams": 4, "rows": {"a": "1"}})
    same.resume()
    assert same.results == {"a": result()}


def test_changed_weights_are_refused(tmp_path):
    model, path = tiny_model(), tmp_path / "s.json"
    first = ScoresFile(path, {})
    first.check_weights(model)
    first.add(result())
    again = ScoresFile(path, {})
    again.resume()
    again.check_weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    again = ScoresFile(path, {})
    again.resume()
    with pytest.raises(ValueError, match="of other weights: the model or the adapter was changed"):
        again.check_weights(model)


@pytest.mark.parametrize("text, message", [("{}", "no scores of a suite"), ("{", "s.json"), ("[]", "no scores")])
def test_other_files_are_not_continued(text, message, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ScoresFile(tmp_path / "s.json", {}).resume()


def test_a_damaged_result_is_an_error(tmp_path):
    (tmp_path / "s.json").write_text('{"options": {}, "tasks": [{"name": "a"}]}')
    with pytest.raises(ValueError, match="is damaged"):
        ScoresFile(tmp_path / "s.json", {}).resume()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_of_the_weights_sees_every_parameter(dtype):
    model = tiny_model(dtype=dtype)
    digests = {weights_digest(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        digests.add(weights_digest(model))
    assert len(digests) == 1 + len(list(model.parameters()))
