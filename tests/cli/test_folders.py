"""Every command that takes an adapter folder takes the output folder of a run too."""

from pathlib import Path

import pytest
from support.commands import s2ft_command
from support.inside import adapters_in
from support.states import with_adapter
from train.tiny import tiny_model

import s2ft


def save_run(folder, seed=0, finished=True):
    """Write the output of s2ft sft: options, a checkpoint, and the adapter if the run is finished."""
    model = with_adapter(tiny_model(), s2ft.S2FTConfig(d_ratio=0.1, seed=seed))
    s2ft.save_adapter(model, folder / "checkpoint-12")
    (folder / "checkpoint-12/trainer_state.json").write_text("{}")
    (folder / "run.json").write_text("{}")
    if finished:
        s2ft.save_adapter(model, folder / "adapter")


@pytest.fixture(scope="module")
def work(work):
    for seed, name in enumerate(("math", "chat")):
        save_run(work / "runs" / name, seed)
    save_run(work / "stopped", finished=False)
    return work


def commands(work, adapter, output):
    return {
        "info": ["info", adapter],
        "eval": [
            "eval",
            "--model",
            work / "model",
            "--adapter",
            adapter,
            "--data",
            work / "data.jsonl",
            "--task",
            "arithmetic",
            "--max-new-tokens",
            2,
        ],
        "generate": [
            "generate",
            "--model",
            work / "model",
            "--adapter",
            adapter,
            "--prompt",
            "a",
            "--max-new-tokens",
            2,
        ],
        "merge": ["merge", "--model", work / "model", "--adapter", adapter, "--output", output],
        "export": ["export", adapter, "--model", work / "model", "--output", output],
        "combine": ["combine", adapter, work / "runs/chat", "--output", output],
    }


NAMES = list(commands(Path(), "", ""))


@pytest.mark.parametrize("command", NAMES)
def test_every_command_takes_the_output_of_a_run_and_info_a_checkpoint(work, tmp_path, command):
    adapter = work / ("stopped/checkpoint-12" if command == "info" else "runs/math")
    assert s2ft_command(*commands(work, adapter, tmp_path / "out")[command]) == 0


@pytest.mark.parametrize("command", NAMES)
@pytest.mark.parametrize(
    "adapter, message",
    [("stopped", "stopped is the output of a run that has saved no adapter yet"), ("nosuch", "nosuch doesn't exist")],
)
def test_every_command_names_the_fault_of_a_folder(work, tmp_path, capsys, command, adapter, message):
    assert s2ft_command(*commands(work, work / adapter, tmp_path / "out")[command]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_api_takes_the_output_of_a_run(work):
    assert s2ft.Selection.load(work / "runs/math") == s2ft.read_adapter(work / "runs/math").selection
    model = with_adapter(tiny_model(), s2ft.S2FTConfig(d_ratio=0.1, exclude=str(work / "runs/math")))
    assert (
        s2ft.adapter.adapter.overlap([s2ft.get_adapter(model, "default"), s2ft.read_adapter(work / "runs/math")]).units
        == 0
    )
    bank = s2ft.AdapterBank(tiny_model(), work / "runs")
    bank.add("mine", work / "runs/math")
    assert bank.names == ["chat", "math", "mine"]
    with bank.batch(["math", "mine"]):
        assert bank.loaded == ["math", "mine"]


def test_adapters_of_a_directory(work, tmp_path):
    assert adapters_in(work / "runs") == {name: work / "runs" / name / "adapter" for name in ("math", "chat")}
    assert adapters_in(work / "runs/math") == {"math": work / "runs/math/adapter"}  # the output of a single run
    assert adapters_in(work / "runs/math/adapter") == {} == adapters_in(work / "stopped")
    (tmp_path / "a").symlink_to(work / "runs/math/adapter"), (tmp_path / "b.txt").touch()
    assert adapters_in(tmp_path) == {"a": tmp_path / "a"}
