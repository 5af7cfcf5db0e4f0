"""s2ft sft, eval and select with text that must not be forgotten."""

import json

import pytest
from text.test_divergence import direct, direct_kl, direct_loss
from train.tiny import sums, tiny_model, tiny_tokenizer, write_jsonl

pytest.importorskip("trl")

from support.inside import DataOptions, read_log, read_texts, text_rows

import s2ft
from s2ft.cli.main import main

TEXTS = ["A heron stands in the water and waits.", "Iron rusts where salt and rain meet it.", "The hill is steep."]


@pytest.fixture(scope="module")
def work(work):
    write_jsonl(work / "other.jsonl", [{"text": text} for text in TEXTS])
    return work


def sft(work, output, *words, status=0):
    options = ["--batch-size", "2", "--max-steps", "4", "--save-steps", "2", "--lr", "1e-2", "--d-ratio", "0.1"]
    files = ["--model", work / "model", "--data", work / "data.jsonl", "--output", output]
    assert main(["sft", *map(str, [*files, *options, *words])]) == status


@pytest.fixture(scope="module")
def measured(work, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    words = ["--forgetting-data", work / "other.jsonl", "--measure-kl", "--meter-steps", "1", "--protect"]
    sft(work, output, *words, work / "other.jsonl")
    return output


def other_rows(work):
    return text_rows(read_texts(DataOptions(data=[str(work / "other.jsonl")])), tiny_tokenizer(), 256)


def with_adapter(output):
    model = tiny_model()
    s2ft.load_adapter(model, output / "adapter")
    return model


def test_sft_writes_the_values_into_its_log_and_its_report(work, measured):
    lines = [line for line in read_log(measured / "log.jsonl") if "forgetting" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("base_kl" in line for line in lines)
    report = json.loads((measured / "report.json").read_text())
    rows = other_rows(work)
    rise = direct_loss(with_adapter(measured), rows) - direct_loss(tiny_model(), rows)
    assert report["forgetting"] == lines[-1]["forgetting"] == pytest.approx(rise, abs=2e-5)


def test_protect_is_recorded_and_a_run_without_it_has_other_units(work, measured, tmp_path):
    adapter = s2ft.read_adapter(measured / "adapter")
    assert adapter.config.protect_ratio == 0.5
    sft(work, tmp_path / "run")
    plain = s2ft.read_adapter(tmp_path / "run/adapter")
    assert plain.config.protect_ratio is None and plain.selection != adapter.selection


def test_eval_measures_the_adapter_against_its_base_on_text_prompts_and_answers(work, measured, tmp_path, capsys):
    common = ["eval", "--model", work / "model", "--adapter", measured, "--forgetting", work / "other.jsonl"]
    assert main([*map(str, [*common, "--output", tmp_path / "alone.json"])]) == 0
    assert capsys.readouterr().out.startswith("forgetting ")
    alone = json.loads((tmp_path / "alone.json").read_text())["drift"]
    assert alone["forgetting"] == pytest.approx(
        json.loads((measured / "report.json").read_text())["forgetting"], abs=2e-5
    )
    scored = ["--data", work / "data.jsonl", "--task", "arithmetic", "--max-new-tokens", 2, "--kl", "--num-beams", 2]
    assert main([*map(str, [*common, *scored, "--output", tmp_path / "scored.json"])]) == 0
    found = json.loads((tmp_path / "scored.json").read_text())
    assert found["of"] == 12 and found["drift"]["kl_on"] == "prompts" and "KL from the base" in capsys.readouterr().out
    tokenizer = tiny_tokenizer()
    rows = []
    for row in sums(12):
        chat = [{"role": "user", "content": row["instruction"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        rows.append({"input_ids": [*ids, 0], "labels": [-100, *ids[1:], 0]})
    kl = direct_kl(direct(tiny_model(), rows)[0], direct(with_adapter(measured), rows)[0])
    assert found["drift"]["base_kl"] == pytest.approx(kl, rel=1e-3, abs=2e-6)
    assert found["drift"]["positions"] == sum(len(row["input_ids"]) - 1 for row in rows)
    words = ["--data", work / "data.jsonl", "--kl", "--kl-on", "answers", "--max-new-tokens", 3]
    assert main([*map(str, ["eval", "--model", work / "model", "--adapter", measured, *words])]) == 0
    assert capsys.readouterr().out.startswith("KL from the base ")


def test_select_protects(work, tmp_path, capsys):
    common = ["select", "--model", work / "model", "--d-ratio", "0.1"]
    protect = ["--protect", work / "other.jsonl", "--protect-rows", 2]
    for name, words in (("plain", []), ("protected", protect), ("few", [*protect, "--protect-ratio", "0.9"])):
        assert main([*map(str, [*common, *words, "--output", tmp_path / f"{name}.json"])]) == 0
    plain, protected = (s2ft.Selection.load(tmp_path / f"{name}.json") for name in ("plain", "protected"))
    assert plain != protected and [len(units) for units in protected.units.values()] == [6, 6]
    words = [*protect, "--protect-ratio", "0.95", "--output", tmp_path / "none.json"]
    assert main([*map(str, [*common, *words])]) == 2 and "protect_ratio=0.95" in capsys.readouterr().err
