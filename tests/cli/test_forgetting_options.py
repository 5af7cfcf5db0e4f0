"""s2ft sft, eval and select with text that must not be forgotten."""

import json

import pytest
from support.commands import files_of, s2ft_command
from support.inside import read_log
from text.test_divergence import direct, direct_kl
from train.tiny import sums, tiny_model, tiny_tokenizer, user, write_jsonl

import s2ft

TEXTS = ["A heron stands in the water and waits.", "Iron rusts where salt and rain meet it.", "The hill is steep."]


@pytest.fixture(scope="module")
def work(work):
    write_jsonl(work / "other.jsonl", [{"text": text} for text in TEXTS])
    return work


def sft(work, output, *words, status=0):
    options = ["--batch-size", "2", "--max-steps", "4", "--save-steps", "2", "--lr", "1e-2", "--d-ratio", "0.1"]
    assert s2ft_command("sft", *files_of(work, output), *options, *words) == status


@pytest.fixture(scope="module")
def measured(work, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    words = ["--forgetting-data", work / "other.jsonl", "--measure-kl", "--meter-steps", "1", "--protect"]
    sft(work, output, *words, work / "other.jsonl")
    return output


def test_sft_writes_the_values_into_its_log_and_its_report_and_records_protect(work, measured, tmp_path):
    lines = [line for line in read_log(measured / "log.jsonl") if "forgetting" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("base_kl" in line for line in lines)
    assert json.loads((measured / "report.json").read_text())["forgetting"] == lines[-1]["forgetting"]
    adapter = s2ft.read_adapter(measured / "adapter")
    sft(work, tmp_path / "run")
    plain = s2ft.read_adapter(tmp_path / "run/adapter")
    assert (adapter.config.protect_ratio, plain.config.protect_ratio) == (0.5, None)
    assert plain.selection != adapter.selection


def test_eval_measures_the_adapter_against_its_base_on_text_prompts_and_answers(work, measured, tmp_path, capsys):
    def evaluate(*words):
        models = ("--model", work / "model", "--adapter", measured)
        assert s2ft_command("eval", *models, "--output", tmp_path / "out.json", *words) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        (tmp_path / "out.json").unlink()
        return found, capsys.readouterr().out

    text = ["--forgetting", work / "other.jsonl"]
    found, printed = evaluate(*text)
    reported = json.loads((measured / "report.json").read_text())["forgetting"]
    assert printed.startswith("forgetting ") and found["drift"]["forgetting"] == pytest.approx(reported, abs=2e-5)
    asked = ["--data", work / "data.jsonl", "--max-new-tokens", 2, "--kl"]
    found, printed = evaluate(*text, *asked, "--task", "arithmetic", "--num-beams", 2, "--field", "output=output")
    assert found["of"] == 12 == len(found["records"]) and "KL from the base" in printed
    tokenizer, models = tiny_tokenizer(), (tiny_model(), tiny_model())
    s2ft.load_adapter(models[1], measured / "adapter")
    prompts = [
        tokenizer.apply_chat_template([user(row["instruction"])], add_generation_prompt=True, return_dict=False)
        for row in sums(12)
    ]
    rows = [{"input_ids": [*ids, 0], "labels": [-100, *ids[1:], 0]} for ids in prompts]
    kl = direct_kl(*(direct(model, rows)[0] for model in models))
    assert found["drift"]["base_kl"] == pytest.approx(kl, rel=1e-3, abs=2e-6) and found["drift"]["kl_on"] == "prompts"
    assert evaluate(*asked, "--kl-on", "answers")[1].startswith("KL from the base ")


def test_select_protects(work, tmp_path):
    selections = []
    for words in ([], ["--protect", work / "other.jsonl", "--protect-rows", 2, "--protect-ratio", "0.9"]):
        file = tmp_path / f"{len(words)}.json"
        assert s2ft_command("select", "--model", work / "model", "--d-ratio", 0.1, "--output", file, *words) == 0
        selections.append(s2ft.Selection.load(file))
    assert selections[0] != selections[1] and [len(units) for units in selections[1].units.values()] == [6, 6]
