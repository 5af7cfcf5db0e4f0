"""s2ft plan and s2ft estimate: their numbers are those of attach, of a real LoRA, of saved files and of s2ft.estimate."""

import json

import peft
import pytest
import torch
from support.commands import s2ft_command
from support.inside import loss_in_chunks, planned, rows_of, saved_by_bits, size_of, with_memory
from support.models import model_of
from train.tiny import save_tiny, tiny_model

import s2ft

CONFIG = s2ft.S2FTConfig(d_ratio=0.25, u_ratio=0.25, o_ratio=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("work") / "model")


def printed(capsys, *words):
    assert s2ft_command(*words) == 0
    return capsys.readouterr().out


def test_a_row_is_what_attach_trains_and_what_a_lora_of_its_rank_has(tmp_path):
    row = planned(tiny_model(), CONFIG, None)
    model = tiny_model()
    report = s2ft.attach(model, CONFIG)
    assert (row.trained, row.share) == (report.trainable, report.share)
    lora = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["down_proj", "up_proj", "o_proj"]))
    assert row.lora_rank * lora.get_nb_trainable_parameters()[0] / 2 == pytest.approx(row.trained)
    s2ft.save_adapter(model, tmp_path / "adapter")
    written = (tmp_path / "adapter/s2ft_adapter.safetensors").stat().st_size
    assert row.adapter_bytes < written < row.adapter_bytes + 4096  # the header of the file


def test_rows_replace_all_ratios_and_keep_the_given_one():
    rows = rows_of(tiny_model(), s2ft.S2FTConfig(d_ratio=0.25, u_ratio=0.25), (0.5, 0.25))
    assert [row.ratio for row in rows] == [0.25, 0.5] and rows[1].trained == 2 * rows[0].trained
    mixed = rows_of(tiny_model(), s2ft.S2FTConfig(d_ratio=0.5, o_ratio=0.25), (0.25, 0.01))
    assert [row.ratio for row in mixed] == [None, 0.01, 0.25] and "selects none of the" in mixed[1].refused
    assert [row.ratio for row in rows_of(tiny_model(), s2ft.S2FTConfig(d_ratio=0.5, budget=700))] == [None]


def test_plan(folder, capsys):
    text = printed(capsys, "plan", folder, "--d-ratio", 0.25, "--ratios", 0.5)
    assert "16 of 64 channels" in text
    assert [line.split()[0] for line in text.split("LoRA rank  adapter\n")[1].splitlines()[:2]] == ["0.25", "0.5"]
    found = json.loads(printed(capsys, "plan", folder, "--ratios", 0.5, "--json"))
    assert [row["trained"] for row in found["rows"]] == [1216, 2048] and found["rows"][0]["peak"] is None


def test_estimate_counts_the_ends_and_draws_a_line_that_is_never_below(folder, capsys):
    command = ["estimate", folder, "--batch-size", 2, "--max-length", 32, "--d-ratio", 0.25, "--ratios", 0.5, 1.0]
    found = json.loads(printed(capsys, *command, "--device-memory", "300KB", "--device", "cpu", "--json"))
    peaks = [
        s2ft.estimate(
            tiny_model(), s2ft.S2FTConfig(d_ratio=ratio), 2, 32, loss=loss_in_chunks, use_cache=False, device="cpu"
        ).peak
        for ratio in (0.25, 0.5, 1.0)
    ]
    rows = found["rows"]
    assert [row["counted"] for row in rows] == [True, False, True]
    assert (rows[0]["peak"], rows[2]["peak"]) == (peaks[0], peaks[2])
    assert peaks[1] <= rows[1]["peak"] <= 1.05 * peaks[1]
    assert [row["fits"] for row in rows] == [row["peak"] <= 300 * 1024 for row in rows]


def test_a_config_alone_is_enough_and_a_lora_stands_beside(folder, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_bytes((folder / "config.json").read_bytes())
    sizes = ["--d-ratio", 0.25, "--batch-size", 2, "--max-length", 32, "--device-memory", "1GB"]
    text = printed(capsys, "estimate", config, *sizes)
    assert text == printed(capsys, "estimate", folder, *sizes) and "LoRA's peak" in text
    assert ("(--device cuda counts a GPU's kernels)" in text) != torch.cuda.is_available()
    command = ["estimate", config, *sizes, "--ratios", 0.25, "--device", "cpu", "--json"]
    row = json.loads(printed(capsys, *command))["rows"][0]
    lora = peft.LoraConfig(r=round(row["lora_rank"]), target_modules=["down_proj"])
    alone = s2ft.estimate(tiny_model(), lora, 2, 32, device="cpu", loss=loss_in_chunks, use_cache=False)
    assert row["lora_peak"] == alone.peak
    assert printed(capsys, "plan", config) == printed(capsys, "plan", folder)
    assert printed(capsys, "couplings", config) == printed(capsys, "couplings", folder)


def test_a_model_that_the_hub_does_not_give_names_the_config_as_a_way_out(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert s2ft_command("estimate", "nobody/has-this") != 0
    assert "A config.json of the model is enough here: give its path" in capsys.readouterr().err


def test_the_logits_of_a_capped_head_are_counted():
    model, step = model_of("gemma2"), dict(batch=2, length=32, strategy=None, memory=None, device="cpu")
    rows = rows_of(model, CONFIG, ())
    chunked, kept = (with_memory(rows, model, CONFIG, step, chunked, None)[1].peak for chunked in (True, False))
    assert chunked == kept


def test_a_quantized_base_saves_what_its_linear_layers_save():
    model = tiny_model(tie_word_embeddings=False)
    weights = [layer.weight.numel() for layer in model.model.modules() if type(layer) is torch.nn.Linear]
    assert len(weights) == 14 and saved_by_bits(model, None) == 0  # without the output layer
    assert saved_by_bits(model, 4) == int(sum(weights) * (4 - 4.5 / 8) - 4 * max(weights))


@pytest.mark.parametrize("text,expected", (("24GB", 24 << 30), ("80 GiB", 80 << 30), ("1.5g", 3 << 29), ("7", 7)))
def test_sizes_of_a_device(text, expected):
    assert size_of(text, "memory") == expected
