"""The commands end to end on a tiny model: sft, eval, merge, info, demo."""

import json

import pytest
import torch
from support.inside import load_model
from support.states import same, with_loaded
from train.tiny import save_tiny, sums, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import s2ft
from s2ft.cli.main import main

SFT = (
    "sft --model {work}/model --data {work}/data.jsonl --output {out} --max-steps 6 --batch-size 4 --micro_batch_size 4 "
    "--learning-rate 1e-2 --save-steps 3 --d-ratio 0.1 --o_ratio 0.25"
)
EVAL = "eval --model {model} --data {work}/data.jsonl --task arithmetic --limit 4 --max-new-tokens 8 --output {out}"


def command(text, status=0, **paths):
    assert main([word.format(**paths) for word in text.split()]) == status


@pytest.fixture(scope="module")
def work(work):
    """A folder with a model, data and a finished run in out/."""
    command(SFT, work=work, out=work / "out")
    return work


@pytest.fixture(scope="module")
def merged(work):
    command(
        "merge --model {work}/model --adapter {adapter} --output {out} --max-shard-size 20KB",
        work=work,
        adapter=work / "out/adapter",
        out=work / "merged",
    )
    return work / "merged"


def test_a_run_writes_every_promised_file_and_info_describes_it(work, capsys):
    assert (work / "out/config.yaml").exists()  # train/test_sft.py has the others
    assert [json.loads(line)["step"] for line in (work / "out/log.jsonl").open()] == list(range(1, 7))
    command("info {out}", out=work / "out")
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("o_ratio 0.25, d_ratio 0.1", "model.layers.1.mlp.down_proj", "6 columns"))


def test_a_second_run_needs_overwrite_or_resume(work, tmp_path, monkeypatch, capsys):
    paths, kept = {"work": work, "out": tmp_path / "out"}, []
    monkeypatch.setattr("s2ft.train.device.keep_freed_memory", lambda: kept.append(True))
    command(SFT, **paths)
    first = (tmp_path / "out/log.jsonl").read_text()
    capsys.readouterr()
    command(SFT, 2, **paths)
    assert "--resume goes on with it, --overwrite replaces it" in capsys.readouterr().err
    command(SFT + " --resume", **paths)
    assert (tmp_path / "out/log.jsonl").read_text() == first
    command(SFT + " --overwrite --no-keep-memory", **paths)
    assert len(kept) == 2  # the run that was refused and the last one did not ask for it
    again = (tmp_path / "out/log.jsonl").read_text()
    assert [json.loads(a)["loss"] for a in first.splitlines()] == [json.loads(a)["loss"] for a in again.splitlines()]


def test_a_run_does_not_go_on_after_its_rows_were_replaced(work, tmp_path, capsys):
    def rows(answer):
        write_jsonl(tmp_path / "data.jsonl", [{"instruction": f"{n}", "output": answer} for n in range(12)])

    paths = {"work": work, "out": tmp_path / "out", "rows": tmp_path / "data.jsonl"}
    words = "sft --model {work}/model --data {rows} --output {out} --batch-size 4 --max-steps 4 --d-ratio 0.1"
    rows("yes")
    command(f"{words} --stop-after 2", **paths)
    rows("no")
    command(f"{words} --resume", 2, **paths)
    assert "the training rows have changed since the run" in capsys.readouterr().err
    rows("yes")
    command(f"{words} --resume", **paths)


def test_held_out_rows_that_are_trained_on_are_counted(work, tmp_path, caplog):
    words = "sft --model {work}/model --data {work}/data.jsonl --eval-data {rows} --output {out} --max-steps 1"
    held_out = write_jsonl(tmp_path / "rows.jsonl", [*sums(2), {"instruction": "new", "output": "row"}])
    command(words, work=work, rows=held_out, out=tmp_path / "out")
    assert "2 of 3 held-out rows stand in the training rows too" in caplog.text


def test_eval_with_an_adapter_generates_the_text_of_the_merged_model(work, merged, tmp_path, capsys):
    for name, model, adapter in (("a", work / "model", f" --adapter {work}/out/adapter"), ("b", merged, "")):
        command(EVAL + adapter, model=model, work=work, out=tmp_path / f"{name}.json")
        assert "of 4" in capsys.readouterr().out
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    assert first["records"] == second["records"] and first["of"] == 4
    assert first["records"][0].keys() == {"question", "generated", "answer", "right"}


def test_the_base_is_scored_on_the_prompts_of_the_training(work, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(9)])
    command(
        "sft --model {work}/model --data {rows} --output {out} --max-steps 1 --lr 1e-9",
        work=work,
        rows=rows,
        out=tmp_path / "o",
    )
    for name, model in (("a", "--adapter {out}"), ("b", "--model {work}/model")):
        words = f"eval {model} --data {{rows}} --max-new-tokens 2 --output {{to}}"
        command(words, work=work, rows=rows, out=tmp_path / "o", to=tmp_path / f"{name}.json")
        command(f"{words} --task exact", work=work, rows=rows, out=tmp_path / "o", to=tmp_path / f"{name}.exact.json")
    first, second, *scored = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b", "a.exact", "b.exact")
    )
    assert first["loss_before"] == second["loss_after"] and scored[0]["records"] == scored[1]["records"]


@torch.no_grad()
def test_the_merged_checkpoint_is_one_of_transformers(work, merged):
    """Its files do not name s2ft, so that a program without s2ft loads it."""
    files = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert files <= {path.name for path in merged.iterdir()}
    assert not any("s2ft" in path.read_text().lower() for path in merged.glob("*.json"))
    loaded = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    ids = AutoTokenizer.from_pretrained(merged)("some text 12+3=", return_tensors="pt")["input_ids"]
    trained = with_loaded(load_model(str(work / "model"))[0], work / "out/adapter", trainable=True)
    difference, logits = loaded(ids).logits - trained(ids).logits, trained(ids).logits
    assert difference.abs().max() <= 1e-5 * logits.abs().max()
    assert type(loaded) is type(trained) and same(loaded.state_dict(), s2ft.merge(trained))


DEMO = (
    "demo --model {model} --output {out} --steps 2 --batch-size 2 --held-out 4 --max-new-tokens 4 --d-ratio 0.1 "
    "--o-ratio 0.25"
)


def test_demo_on_a_tiny_model(work, tmp_path, capsys):
    save_tiny(tmp_path / "model", max_position_embeddings=1024)
    command(DEMO, model=tmp_path / "model", out=tmp_path / "demo")
    assert all(
        map(capsys.readouterr().out.count, ("held-out problems:", "peak memory:", "trained:", "adapter:", "together"))
    )
    report = json.loads((tmp_path / "demo/report.json").read_text())
    assert report["problems"] == 4 == len(report["after"]["records"]) and report["adapter_bytes"] > 0
    assert {"adapter", "log.jsonl", "loss.png", "report.json"} <= {p.name for p in (tmp_path / "demo").iterdir()}
    command(DEMO, model=tmp_path / "model", out=tmp_path / "demo")  # a demo replaces an earlier demo and nothing else
    command(DEMO, 2, model=tmp_path / "model", out=work / "out")
