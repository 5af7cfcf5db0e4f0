"""s2ft select and the selection options of s2ft sft."""

import pytest
from support.commands import files_of, s2ft_command
from support.inside import calibration_for
from train.tiny import tiny_tokenizer

import s2ft

RUN = ["--max-steps", "1", "--batch-size", "2", "--micro-batch-size", "2"]


@pytest.mark.parametrize("metric", ("activation", "product", "gradient"))
def test_select_finds_the_units_that_finetune_trains(metric, work, tmp_path, capsys):
    choice = f"--selection {metric} --order smallest --d-ratio 0.1 --v_ratio 0.5 --calibration-examples 6".split()
    assert s2ft_command("select", *files_of(work, tmp_path / "s.json"), "--batch-size", 2, *choice) == 0
    assert "down_proj" in capsys.readouterr().out
    assert s2ft_command("sft", *files_of(work, tmp_path / "out"), *choice, *RUN) == 0
    selection = s2ft.Selection.load(tmp_path / "s.json")
    assert selection == s2ft.Selection.load(tmp_path / "out/adapter")
    assert selection["model.layers.0.mlp.down_proj"].numel() == 6
    config = s2ft.read_adapter(tmp_path / "out/adapter").config
    assert (config.selection, config.order) == (metric, "smallest")


def test_a_calibrated_run_resumes(work, tmp_path):
    arguments = ["sft", *files_of(work, tmp_path / "out"), "--selection", "activation", *RUN]
    assert s2ft_command(*arguments, "--save-steps", 1) == 0 and s2ft_command(*arguments, "--resume") == 0
    assert s2ft_command(*arguments, "--resume", "--calibration-examples", 2) == 2


def test_budget_exclude_and_units(work, tmp_path, capsys):
    def select(name, *options):
        assert s2ft_command("select", "--model", work / "model", "--output", tmp_path / name, *options) == 0
        return s2ft.Selection.load(tmp_path / name)

    assert select("plain.json")["model.layers.0.mlp.down_proj"].numel() == 19  # 0.3 of 64, for a narrow model
    first = select("first.json", "--budget", "0.32k", "--d-ratio", "1")
    assert [len(units) for units in first.units.values()] == [5, 5]  # units of 32 parameters each
    second = select(
        "second.json",
        "--match-lora-rank",
        "2",
        "--exclude",
        tmp_path / "first.json",
        "--selection",
        "weight",
        "--allocation",
        "global",
    )
    assert sum(map(len, second.units.values())) == 2 * 2 * (32 + 64) // 32
    assert not any(set(units.tolist()) & set(first[path].tolist()) for path, units in second.units.items())
    assert s2ft_command("sft", *files_of(work, tmp_path / "out"), "--units", tmp_path / "second.json", *RUN) == 0
    assert "trained" in capsys.readouterr().out and s2ft.Selection.load(tmp_path / "out/adapter") == second
    assert s2ft_command("info", tmp_path / "out") == 0 and "units: given by the user" in capsys.readouterr().out
    assert select("third.json", "--units", tmp_path / "out/adapter") == second


def test_rows_are_drawn_by_seed():
    rows = [{"input_ids": [1, i, 2, 3, *[4] * (i % 2)], "labels": [-100, -100, 2, 3]} for i in range(2, 40)]

    def drawn(seed, examples=None):
        batches = list(
            calibration_for(
                s2ft.S2FTConfig(d_ratio=0.1, selection="activation", seed=seed), tiny_tokenizer(), rows, examples, 5
            )
        )
        return [row[1] for batch in batches for row in batch["input_ids"].tolist()], batches

    first, batches = drawn(0)
    assert first == drawn(0)[0] != drawn(1)[0] and len(set(first)) == 16  # 1 % of the rows would be fewer than 16
    assert [len(batch["input_ids"]) for batch in batches] == [5, 5, 5, 1] and batches[0]["labels"].shape == (5, 4)
    # padding is on the right, which every causal model ignores
    assert {one for batch in drawn(0, 38)[1] for one in batch["attention_mask"][:, 0].tolist()} == {1}
    assert sorted(drawn(0, 38)[0]) == list(range(2, 40))
