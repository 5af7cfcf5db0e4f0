"""Data of s2ft sft: bad rows stop the command before anything is written, and every form trains."""

import pytest
from train.tiny import save_tiny, sums, write_jsonl

import s2ft
from s2ft.cli.main import main

RUN = ["--max-steps", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("work") / "model")


def sft(model, data, output, *options):
    arguments = ["sft", "--model", model, "--data", data, "--output", output, *RUN, *options]
    return main([str(argument) for argument in arguments])


def test_bad_rows_are_listed_and_nothing_is_written(model, tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", [*sums(3), {"instruction": "a", "output": ""}, {"text": 1, "x": 2}, {}])
    assert sft(model, data, tmp_path / "out") == 2
    *_, error, first, second = capsys.readouterr().err.splitlines()
    assert "2 of 6 rows" in error and "line 4: field 'output'" in first and "line 6: needs messages" in second
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_left_out_if_asked(model, tmp_path, caplog):
    caplog.set_level("INFO")
    data = write_jsonl(tmp_path / "a.jsonl", [*sums(3), {"instruction": "a", "output": ""}])
    assert sft(model, data, tmp_path / "out", "--skip-bad-rows") == 0
    assert "left out 1 of 4 rows that can't be used" in caplog.text and "3 token rows" in caplog.text


def test_texts_train_without_a_template_and_the_adapter_says_so(model, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "Lima is in Peru."}, {"prompt": "2+3=", "completion": "5"}])
    assert sft(model, data, tmp_path / "out") == 0
    adapter = s2ft.read_adapter(tmp_path / "out/adapter")
    assert adapter.info["prompt"]["form"] == "text" and adapter.config.ratios == {"d": 0.03}  # the paper's ratio


def test_template_that_drops_the_answer_is_refused_before_anything_is_written(model, tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", sums(3))
    assert sft(model, data, tmp_path / "out", "--chat-template", "{{ messages[-1]['content'][:3] }}") == 2
    assert "leaves out the question of a chat" in capsys.readouterr().err and not (tmp_path / "out").exists()
