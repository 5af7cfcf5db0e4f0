"""Each training option of `s2ft sft` has the promised effect, and impossible values are refused."""

import pytest
import torch
from safetensors.torch import load_file
from support.commands import files_of, s2ft_command
from support.inside import load_model, read_log
from train.test_loading import NEEDS_BITSANDBYTES
from train.tiny import write_jsonl

from s2ft import read_adapter


def sft(work, output, *more, steps=4, trained=("--d-ratio", "0.1"), rate="1e-2"):
    return s2ft_command(
        "sft",
        *files_of(work, output),
        *f"--max-steps {steps} --batch-size 4 --micro-batch-size 2 --learning-rate {rate} --save-steps 2".split(),
        *trained,
        *more,
    )


def deltas(output):
    return {
        key: value
        for key, value in load_file(output / "adapter/s2ft_adapter.safetensors").items()
        if key.endswith("delta")
    }


@pytest.fixture(scope="module")
def plain(work):
    assert sft(work, work / "plain") == 0
    return deltas(work / "plain")


def test_a_loss_that_rises_is_a_warning(work, caplog, monkeypatch):
    monkeypatch.setattr("s2ft.train.run.RISEN", 0.5)  # the loss of a random model can't rise much
    assert sft(work, work / "risen") == 0
    assert "the loss has risen from" in caplog.text and "which was 0.01" in caplog.text


def test_the_first_line_of_a_run_names_a_release_that_is_newer_than_any_tested_one(work, monkeypatch, caplog, capsys):
    monkeypatch.setattr("s2ft.foreign.version", lambda package: "99.1")
    caplog.set_level("INFO")
    assert sft(work, work / "newer", steps=1) == 0
    first, *others = [record.message for record in caplog.records if record.name.startswith("s2ft")]
    assert "transformers 99.1 (tested up to" in first and not any("tested with" in line for line in others)
    assert "tested with" not in capsys.readouterr().out  # the report does not say it again


SLOW = pytest.mark.slow
# The largest difference of trained values from those of a plain run, relative to the largest value, or the mean
# difference relative to the mean value. None: the option changes the training.
OPTIONS = {
    "--gradient-checkpointing": ((), ("largest", 1e-4)),
    "--optimizer adamw_torch": ((SLOW,), ("largest", 1e-4)),
    "--optimizer sgd": ((SLOW,), None),
    "--optimizer adafactor": ((SLOW,), None),
    "--bf16": ((), ("mean", 0.2)),
    "--no-chunked-loss": ((), ("largest", 1e-3)),
    "--schedule constant_with_warmup": ((SLOW,), None),
    "--layout indexed": ((SLOW,), ("largest", 1e-4)),
    "--dtype bfloat16": ((), ("mean", 0.2)),
    "--attn-implementation eager": ((), ("largest", 1e-4)),
    "--load-in-4bit": ((NEEDS_BITSANDBYTES,), None),
    "--load-in-8bit": ((NEEDS_BITSANDBYTES, SLOW), None),
    "--adam-beta2 0.9": ((SLOW,), None),
    "--adam-epsilon 1": ((SLOW,), None),
    "--neftune 5": ((SLOW,), None),
    "--weight-decay 0.5": ((SLOW,), None),
    "--max-grad-norm 1e-6 --optim sgd": ((SLOW,), None),
    "--data-seed 1": ((SLOW,), None),
    "--train-sampling-strategy sequential": ((SLOW,), None),
    "--no-assistant-only-loss": ((SLOW,), None),
    "--packing --max-length 128": ((SLOW,), None),
    '--lr-scheduler-type polynomial --lr-scheduler-kwargs {"power":3}': ((), None),
    "--compile": ((SLOW,), ("largest", 1e-2)),
}


@pytest.mark.parametrize("option", [pytest.param(option, marks=marks) for option, (marks, _) in OPTIONS.items()])
def test_options(option, work, plain, tmp_path):
    assert sft(work, tmp_path / "out", *option.split()) == 0
    found, expected = deltas(tmp_path / "out"), OPTIONS[option][1]
    assert found.keys() == plain.keys() and all(bool((value != 0).any()) for value in found.values())
    if expected is None:
        assert any(not torch.equal(found[key], plain[key]) for key in plain)
        return
    kind, tolerance = expected
    size = torch.Tensor.max if kind == "largest" else torch.Tensor.mean
    far = {key: float(size((value - plain[key]).abs())) / float(size(plain[key].abs())) for key, value in found.items()}
    assert max(far.values()) <= tolerance


def test_evaluation_while_training_does_not_change_what_is_trained(work, plain, tmp_path, capsys):
    task = ("--eval-data", work / "data.jsonl", "--eval-task", "arithmetic", "--max-new-tokens", 3)
    assert sft(work, tmp_path / "often", *task, "--eval-steps", 2, "--eval-limit", 3) == 0
    assert "tokens/s" in capsys.readouterr().out and (tmp_path / "often/loss.png").is_file()
    assert sft(work, tmp_path / "once", *task) == 0
    for name, steps in (("often", [2, 4]), ("once", [4])):
        lines = [line for line in read_log(tmp_path / name / "log.jsonl") if "eval_loss" in line]
        assert [line["step"] for line in lines] == steps
        assert all(0 <= line["eval_accuracy"] <= 1 and line["eval_loss"] > 0 for line in lines)
        assert all(torch.equal(value, plain[key]) for key, value in deltas(tmp_path / name).items())
    wrong = ("--early-stopping-patience 2 --load-best-model-at-end false", "--metric-for-best-model accuracy")
    assert [sft(work, tmp_path / "no", *task[:2], "--eval-steps", 2, *words.split()) for words in wrong] == [2, 2]


def test_texts_train_without_a_template_and_the_adapter_says_so(work, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "Lima is in Peru."}, {"prompt": "2+3=", "completion": "5"}])
    assert (
        s2ft_command("sft", "--model", work / "model", "--data", data, "--output", tmp_path / "out", "--max-steps", 1)
        == 0
    )
    adapter = read_adapter(tmp_path / "out/adapter")
    assert adapter.info["prompt"]["form"] == "text"
    assert adapter.config.ratios == {"d": 0.3}  # the default of a narrow model


def test_modules_are_trained_in_full_saved_and_merged(work, tmp_path, capsys):
    """The result is the same with and without the chunked loss, and in a run that was stopped and resumed."""
    more = ("--modules-to-save", "norm", "lm_head")
    assert sft(work, tmp_path / "out", *more, "--stop-after", 2) == 0
    assert sft(work, tmp_path / "out", *more, "--resume") == 0
    assert sft(work, tmp_path / "kept", *more, "--chunked-loss", "False") == 0
    base, found = load_model(str(work / "model"))[0], read_adapter(tmp_path / "out/adapter").extra_weights
    assert set(found) == {"model.norm.weight", "model.embed_tokens.weight"}  # the head is tied to the embeddings
    for name, value in read_adapter(tmp_path / "kept/adapter").extra_weights.items():
        assert not torch.equal(found[name], base.get_parameter(name))
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)
    assert "trained in full: model.embed_tokens.weight, model.norm.weight" in capsys.readouterr().out
    assert (
        s2ft_command("merge", "--model", work / "model", "--adapter", tmp_path / "out", "--output", tmp_path / "merged")
        == 0
    )
    assert torch.equal(load_model(str(tmp_path / "merged"))[0].model.norm.weight, found["model.norm.weight"])
