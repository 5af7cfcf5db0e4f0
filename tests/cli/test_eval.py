"""s2ft eval: accuracy and distance of an adapter, and options that are refused before a model is loaded."""

import json

import pytest
import torch
from train.tiny import save_tiny, sums, tiny_model, write_jsonl

import s2ft
from s2ft.cli.main import main


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
    """A base, an adapter, and rows."""
    work = tmp_path_factory.mktemp("eval")
    save_tiny(work / "model")
    save_trained(work / "adapter", 0.5)
    write_jsonl(work / "sums.jsonl", sums(5))
    return work


def evaluate(work, *words, status=0):
    assert main(["eval", "--model", str(work / "model"), "--max-new-tokens", "6", *map(str, words)]) == status


def test_beams_and_the_distance_from_the_base_are_in_the_file(work, tmp_path, capsys):
    rows = ("--data", work / "sums.jsonl", "--task", "arithmetic", "--limit", 3)
    evaluate(work, *rows, "--adapter", work / "adapter", "--num-beams", 2, "--kl", "--output", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["of"] == len(found["records"]) == 3 and found["drift"]["base_kl"] > 0
    assert f"of {found['of']}," in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "WORK/sums.jsonl", "--task", "commonsense"], "example 1: "),
        (["--data", "WORK/nosuch.jsonl", "--task", "arithmetic"], "nosuch.jsonl"),
        (["--data", "WORK/sums.jsonl", "--task", "arithmetic", "--output", "WORK/model"], "exists"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(words, message, work, monkeypatch, capsys):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("s2ft.text.adapter_prompts.load_with_adapter", load)
    evaluate(work, *(word.replace("WORK", str(work)) for word in words), status=2)
    assert message in capsys.readouterr().err
