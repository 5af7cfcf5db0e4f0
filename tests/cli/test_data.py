"""Data of s2ft sft: bad rows stop the command before anything is written, and every form trains."""

import pytest
from train.tiny import save_tiny, write_jsonl

import s2ft
from s2ft.cli.main import main

RUN = ["--max-steps", "1", "--batch-size", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("work") / "model")


def sft(model, data, output, *options):
    arguments = ["sft", "--model", model, "--data", data, "--output", output, *RUN, *options]
    return main([str(argument) for argument in arguments])


def test_texts_train_without_a_template_and_the_adapter_says_so(model, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "Lima is in Peru."}, {"prompt": "2+3=", "completion": "5"}])
    assert sft(model, data, tmp_path / "out") == 0
    adapter = s2ft.read_adapter(tmp_path / "out/adapter")
    assert adapter.info["prompt"]["form"] == "text" and adapter.config.ratios == {"d": 0.03}  # the paper's ratio
