"""The commands end to end on a tiny model: sft, eval, merge, info, demo."""

import json
import subprocess
import sys

import pytest
import torch
from train.tiny import save_tiny, sums, write_jsonl

import s2ft
from s2ft.cli.chat import ChatArguments
from s2ft.cli.main import main
from s2ft.cli.parse import parse
from s2ft.text.models import load_model

TRAINING = [
    "--max-steps",
    "6",
    "--batch-size",
    "4",
    "--micro_batch_size",
    "4",
    "--learning-rate",
    "1e-2",
    "--save-steps",
    "3",
    "--d-ratio",
    "0.1",
    "--o_ratio",
    "0.25",
]


def s2ft_command(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, data and a finished run in out/."""
    work = tmp_path_factory.mktemp("work")
    save_tiny(work / "model")
    write_jsonl(work / "data.jsonl", sums(12))
    s2ft_command("sft", "--model", work / "model", "--data", work / "data.jsonl", "--output", work / "out", *TRAINING)
    return work


def trained_weights(work):
    model, _ = load_model(str(work / "model"))
    s2ft.load_adapter(model, work / "out/adapter", trainable=True)
    return model


def test_finetune_writes_every_promised_file(work):
    out = work / "out"
    assert {"adapter", "log.jsonl", "loss.png", "run.json", "report.json", "checkpoint-3"} <= {
        path.name for path in out.iterdir()
    }
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()] == list(range(1, 7))


def test_default_ratio_is_the_papers(work, tmp_path):
    s2ft_command(
        "sft",
        "--model",
        work / "model",
        "--data",
        work / "data.jsonl",
        "--output",
        tmp_path / "out",
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        "--micro-batch-size",
        "2",
    )
    assert s2ft.adapter.read_adapter(tmp_path / "out/adapter").config.ratios == {"d": 0.03}


def test_a_second_finetune_needs_overwrite_or_resume(work, tmp_path, capsys):
    run = ["sft", "--model", work / "model", "--data", work / "data.jsonl", "--output", tmp_path / "out", *TRAINING]
    s2ft_command(*run)
    first = (tmp_path / "out/log.jsonl").read_text()
    assert main([str(a) for a in run]) == 2
    s2ft_command(*run, "--resume")
    assert (tmp_path / "out/log.jsonl").read_text() == first
    s2ft_command(*run, "--overwrite")
    assert [json.loads(a)["loss"] for a in first.splitlines()] == [
        json.loads(line)["loss"] for line in (tmp_path / "out/log.jsonl").open()
    ]


def test_eval_with_and_without_adapter(work, tmp_path, capsys):
    for adapter in ([], ["--adapter", work / "out/adapter"]):
        result = tmp_path / f"{len(adapter)}.json"
        s2ft_command(
            "eval",
            "--model",
            work / "model",
            "--data",
            work / "data.jsonl",
            "--task",
            "arithmetic",
            *adapter,
            "--limit",
            3,
            "--max-new-tokens",
            6,
            "--batch-size",
            2,
            "--output",
            result,
        )
        assert "of 3" in capsys.readouterr().out
        content = json.loads(result.read_text())
        assert content["of"] == 3 and content["records"][0].keys() == {"question", "generated", "answer", "right"}


def test_eval_with_an_adapter_generates_the_text_of_the_merged_model(work, tmp_path):
    s2ft_command("merge", "--model", work / "model", "--adapter", work / "out/adapter", "--output", tmp_path / "merged")
    generated = []
    for name, arguments in {
        "a": ["--model", work / "model", "--adapter", work / "out/adapter"],
        "b": ["--model", tmp_path / "merged"],
    }.items():
        s2ft_command(
            "eval",
            *arguments,
            "--data",
            work / "data.jsonl",
            "--task",
            "arithmetic",
            "--limit",
            4,
            "--max-new-tokens",
            8,
            "--output",
            tmp_path / f"{name}.json",
        )
        generated.append([r["generated"] for r in json.loads((tmp_path / f"{name}.json").read_text())["records"]])
    assert generated[0] == generated[1]


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
ids = AutoTokenizer.from_pretrained(folder)("some text 12+3=", return_tensors="pt")["input_ids"]
torch.save({"weights": model.state_dict(), "logits": model(ids).logits.detach(), "ids": ids,
            "s2ft": [m for m in sys.modules if m.startswith("s2ft")]}, out)
"""


def test_the_merged_checkpoint_loads_in_a_process_without_s2ft(work, tmp_path):
    s2ft_command("merge", "--model", work / "model", "--adapter", work / "out/adapter", "--output", tmp_path / "merged")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "merged"), str(tmp_path / "seen.pt")], check=True)
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["s2ft"] == []
    trained = trained_weights(work)
    with torch.no_grad():
        logits = trained(seen["ids"]).logits
    assert (seen["logits"] - logits).abs().max() <= 1e-5 * logits.abs().max()
    base, merged = load_model(str(work / "model"))[0].state_dict(), s2ft.merge(trained).state_dict()
    assert seen["weights"].keys() == merged.keys()
    assert all(torch.equal(seen["weights"][key], weight) for key, weight in merged.items())
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed and all(key.endswith(("down_proj.weight", "o_proj.weight")) for key in changed)


def test_merge_and_eval_use_the_dtype_of_training(work, tmp_path):
    """A float32 checkpoint is trained in bfloat16. Merged weights equal the trained ones, bit for bit."""
    s2ft_command(
        "sft",
        "--model",
        work / "model",
        "--data",
        work / "data.jsonl",
        "--output",
        tmp_path / "out",
        *TRAINING,
        "--dtype",
        "bfloat16",
    )
    s2ft_command(
        "merge", "--model", work / "model", "--adapter", tmp_path / "out/adapter", "--output", tmp_path / "merged"
    )
    trained, _ = load_model(str(work / "model"), "bfloat16")
    s2ft.load_adapter(trained, tmp_path / "out/adapter", trainable=True)
    merged, expected = load_model(str(tmp_path / "merged"))[0].state_dict(), s2ft.merge(trained).state_dict()
    assert all(weight.dtype == torch.bfloat16 and torch.equal(merged[key], weight) for key, weight in expected.items())


def test_the_merged_folder_is_complete_and_no_other_file_is_left(work, tmp_path):
    s2ft_command("merge", "--model", work / "model", "--adapter", work / "out/adapter", "--output", tmp_path / "merged")
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "merged").iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def spoiled_file(folder):
    """Change the last byte of the written weights, as a failing disk would."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_merge_that_fails_its_check_leaves_nothing(work, tmp_path, monkeypatch):
    from s2ft.export import merged as merging

    def spoiled(folder, *arguments):
        compare = write(folder, *arguments)
        spoiled_file(folder)
        return compare

    write = merging.write_merged
    monkeypatch.setattr(merging, "write_merged", spoiled)
    with pytest.raises(RuntimeError, match="is not the merged model: "):
        merging.export(str(work / "model"), work / "out/adapter", tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_a_merge_in_memory_that_fails_its_check_leaves_nothing(work, tmp_path, monkeypatch):
    from s2ft.export import merged as merging
    from s2ft.model.conversion import CannotStream

    def refuse(*arguments):
        raise CannotStream("its weights are a pickle")

    def spoiled(model, folder):
        spoiled_file(folder)
        return compare(model, folder)

    compare = merging._compare
    monkeypatch.setattr(merging, "model_on_disk", refuse)
    monkeypatch.setattr(merging, "_compare", spoiled)
    with pytest.raises(RuntimeError, match="is not the merged model: "):
        merging.export(str(work / "model"), work / "out/adapter", tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_adapter_of_another_base_is_refused(work, tmp_path, capsys):
    save_tiny(tmp_path / "other", seed=5)
    arguments = ["--model", tmp_path / "other", "--adapter", work / "out/adapter"]
    assert main([str(a) for a in ["merge", *arguments, "--output", tmp_path / "merged"]]) == 2
    assert "another base" in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_info(work, capsys):
    s2ft_command("info", work / "out")
    printed = capsys.readouterr().out
    for words in ("o_ratio 0.25, d_ratio 0.1", "model.layers.1.mlp.down_proj", "6 columns"):
        assert words in printed


def test_demo_on_a_tiny_model(work, tmp_path, capsys):
    save_tiny(tmp_path / "model", max_position_embeddings=1024)
    arguments = [
        "demo",
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "demo",
        "--steps",
        2,
        "--batch-size",
        2,
        "--held-out",
        4,
        "--max-new-tokens",
        4,
        "--d-ratio",
        "0.1",
        "--o-ratio",
        "0.25",
    ]
    s2ft_command(*arguments)
    printed = capsys.readouterr().out
    for words in ("held-out problems:", "peak memory:", "trained:", "adapter:", "seconds:"):
        assert words in printed
    report = json.loads((tmp_path / "demo/report.json").read_text())
    assert report["problems"] == 4 == len(report["after"]["records"]) and report["adapter_bytes"] > 0
    assert {"adapter", "log.jsonl", "loss.png", "report.json"} <= {p.name for p in (tmp_path / "demo").iterdir()}
    s2ft_command(*arguments)  # a demo replaces an earlier demo and nothing else
    assert main([str(a) for a in ["demo", "--model", tmp_path / "model", "--output", work / "out"]]) == 2


def test_a_repeated_option_of_several_values_adds_to_them():
    arguments = ["--model", "m", "--adapter", "math=a", "b", "--adapter", "c", "--model", "n"]
    (job,) = parse("chat", "", [ChatArguments], arguments)
    assert (job.adapter, job.model) == (["math=a", "b", "c"], "n")
