"""An adapter beside its base on rows that were not trained on, at the end of a run and by s2ft eval."""

import json

import pytest
from support.inside import compare, mean_loss
from support.states import randomize, with_adapter
from train.test_sft import token_rows
from train.tiny import save_tiny, sums, tiny_model, tiny_tokenizer, write_jsonl

import s2ft
from s2ft.cli.main import main


def test_loss_and_answers_are_those_of_the_base_and_of_the_adapter():
    model, rows = tiny_model(), list(token_rows(6))
    alone = compare(model, tiny_tokenizer(), rows, samples=2, max_new_tokens=5)
    randomize(with_adapter(model, s2ft.S2FTConfig(d_ratio=0.5, o_ratio=0.5)), std=0.3)
    found = compare(model, tiny_tokenizer(), rows, samples=2, max_new_tokens=5)
    assert found.rows == 6 and [found.loss_before, found.loss_after] == pytest.approx(
        [alone.loss_after, mean_loss(model, rows)]
    )
    assert [one["prompt"] for one in found.samples] == ["0+0=", "1+1=1+1="]
    assert [one["right"] for one in found.samples] == [row["output"] for row in sums(2)]
    assert any(one["base"] != one["tuned"] for one in found.samples)
    text = str(found)
    assert f"loss on 6 rows: {alone.loss_after:.4f} before, {found.loss_after:.4f} after (NOT lower)" in text
    assert "base:" in text and "tuned:" in text and "model:" in str(alone) and "tuned:" not in str(alone)


def test_a_model_without_adapter_and_rows_of_plain_text_have_a_loss_alone():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}, {"input_ids": [5], "labels": [5]}]
    found = compare(tiny_model(), tiny_tokenizer(), rows)
    assert found.loss_before is None and not found.samples and str(found) == f"loss on 2 rows: {found.loss_after:.4f}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run on 120 rows, without a word about held-out rows."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model")
    write_jsonl(work / "data.jsonl", sums(120))
    arguments = f"sft --model {work}/model --data {work}/data.jsonl --output {work}/out --max-steps 3 --lr 1e-2"
    assert main([*arguments.split(), "--batch-size", "4", "--d-ratio", "0.2"]) == 0
    return work


def test_a_run_holds_rows_out_and_ends_with_before_and_after(work):
    report = json.loads((work / "out/report.json").read_text())["comparison"]
    assert report["rows"] == 6 and len(report["samples"]) == 3 and report["loss_after"] < report["loss_before"]


def test_eval_compares_without_a_task_and_knows_the_base(work, capsys):
    chats = [{"messages": [{"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}]}]
    write_jsonl(work / "chats.jsonl", chats * 2)
    assert main(f"eval --adapter {work}/out --data {work}/chats.jsonl --output {work}/found.json".split()) == 0
    found, printed = json.loads((work / "found.json").read_text()), capsys.readouterr().out
    assert found["rows"] == 2 and found["model"] == f"{work}/model"
    assert "loss on 2 rows:" in printed and "base:" in printed


def test_zero_holds_nothing_out(work, tmp_path, caplog):
    arguments = f"sft --model {work}/model --data {work}/data.jsonl --output {tmp_path}/out --max-steps 1"
    assert main([*arguments.split(), "--batch-size", "4", "--d-ratio", "0.2", "--test-split-size", "0"]) == 0
    assert "comparison" not in json.loads((tmp_path / "out/report.json").read_text())
