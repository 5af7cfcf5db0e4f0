"""s2ft combine adds up adapters on disk."""

import pytest
import torch
from support.inside import native
from support.models import model_of
from train.tiny import save_random_adapter

import s2ft
from s2ft.cli.main import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters of one base and an adapter of another base."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, case) in enumerate((("a", "llama"), ("b", "llama"), ("other", "qwen2"))):
        save_random_adapter(root / name, model_of(case), name=name, d_ratio=0.5, seed=seed)
    return root


def test_the_sum_is_written_and_the_overlap_is_printed(folders, tmp_path, capsys):
    assert (
        main(
            [
                "combine",
                str(folders / "a"),
                str(folders / "b"),
                "--weights",
                "0.7",
                "-0.3",
                "--output",
                str(tmp_path / "sum"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "trained units are shared" in printed and "adapter 'sum'" in printed
    a, b, total = (s2ft.read_adapter(folder) for folder in (folders / "a", folders / "b", tmp_path / "sum"))
    expected = 0.7 * a + -0.3 * b
    assert all(torch.equal(delta.values, expected.deltas[path].values) for path, delta in total.deltas.items())
    s2ft.load_adapter(model_of("llama"), tmp_path / "sum", trainable=True)


def test_a_sum_records_the_first_prompt_and_another_one_is_said(folders, tmp_path, capsys):
    paths = {"none": folders / "a"}
    for name in ("x", "y"):
        adapter, paths[name] = s2ft.read_adapter(folders / "b"), tmp_path / name
        adapter.name, adapter.info["prompt"] = name, {"form": "chat", "template": name, "system": None}
        native.write(adapter, paths[name])
    for names in (["none", "x"], ["none", "y", "x"]):
        output = tmp_path / "-".join(["sum", *names])
        assert main(["combine", *(str(paths[name]) for name in names), "--output", str(output)]) == 0
        assert s2ft.read_adapter(output).info["prompt"]["template"] == names[1]
        assert ("different prompts; the sum records that of 'y'" in capsys.readouterr().out) == ("y" in names)
