"""lm-eval on a model with an adapter: ``make test-lm-eval`` runs this in an environment that has lm-eval."""

import json

import pytest
import torch
import yaml
from support.inside import Prompter
from train.tiny import save_random_adapter, save_tiny, tiny_model, tiny_tokenizer, write_jsonl

import s2ft
from s2ft.cli.main import main

pytestmark = pytest.mark.lm_eval
CHOICES = ["red", "blue green", "grey"]


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """lm-eval lists all packages of the environment in its results, which takes longer than a tiny model."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task that compares answers and one that generates, and their rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Colour {'a' * n}?", "choices": CHOICES, "answer": n % 3} for n in range(7)]
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_jsonl(folder / "rows.jsonl", rows))}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
    }
    chosen = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    chosen["metric_list"] = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    written = {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}"}
    written["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    written["metric_list"] = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    for name, settings in {"s2ft_choose": chosen, "s2ft_write": written}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **settings}))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base, an adapter and the merged model, as folders."""
    work = tmp_path_factory.mktemp("models")
    save_tiny(work / "base", max_position_embeddings=1024)
    model = tiny_model(max_position_embeddings=1024)
    save_random_adapter(work / "adapter", model, 0.5, d_ratio=0.25, o_ratio=0.25)
    s2ft.merge(model).save_pretrained(work / "merged")
    tiny_tokenizer().save_pretrained(work / "merged")
    return work


def responses(results):
    return {name: [sample["resps"] for sample in samples] for name, samples in results["samples"].items()}


def test_an_adapter_gives_the_numbers_of_the_merged_model(work, tasks):
    """Every log-probability and every generated text is equal, and the weights are restored bit for bit."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from support.inside import as_json, as_table, evaluate, load_with_adapter

    model, prompter = load_with_adapter(str(work / "base"), str(work / "adapter"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["s2ft_choose", "s2ft_write"]
    ours = evaluate(model, prompter, ["s2ft_*"], batch_size=3, include_path=str(tasks), log_samples=True)
    merged = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(work / "merged"), "device": "cpu"},
        tasks=names,
        batch_size=3,
        task_manager=TaskManager(include_path=str(tasks)),
    )
    assert responses(ours) == responses(merged) and set(ours["samples"]) == set(names)
    assert all(ours["results"][name] == merged["results"][name] for name in names)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "s2ft_choose" in as_table(ours) and json.loads(as_json(ours))["results"]["s2ft_choose"]["acc,none"] >= 0


def test_the_chat_template_is_the_adapters(tasks):
    from support.inside import evaluate

    recorded = {"form": "chat", "template": "[{{ messages[-1]['content'] }}]", "system": None}
    prompter = Prompter(tiny_tokenizer(), {"prompt": recorded})
    model = tiny_model(max_position_embeddings=1024)
    settings = {"include_path": str(tasks), "apply_chat_template": True, "log_samples": True, "limit": 1}
    (sample,) = evaluate(model, prompter, ["s2ft_write"], **settings)["samples"]["s2ft_write"]
    assert sample["arguments"][0][0] == "[Colour ?]"
    text = Prompter(tiny_tokenizer(), {"prompt": {"form": "text", "template": None, "system": None}})
    with pytest.raises(ValueError, match="apply_chat_template has no template"):
        evaluate(model, text, ["s2ft_write"], **settings)


def test_the_command(work, tasks, tmp_path, capsys):
    words = ["eval", "--model", work / "base", "--adapter", work / "adapter", "--lm-eval-path", tasks, "--lm-eval"]
    more = ["--limit", 2, "--num-fewshot", 1, "--output", tmp_path / "r.json"]
    assert main([str(word) for word in [*words, "s2ft_choose,s2ft_write", *more]]) == 0
    assert "acc_norm" in capsys.readouterr().out
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["adapter"] == str(work / "adapter") and found["n-shot"] == {"s2ft_choose": 1, "s2ft_write": 1}
    assert main([str(word) for word in [*words, "nosuch_task"]]) == 2
    assert "lm-eval has no task nosuch_task" in capsys.readouterr().err
