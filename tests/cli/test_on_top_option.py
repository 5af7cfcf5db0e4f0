"""s2ft sft --on-top trains a task on top of the adapters of earlier runs, on units that none of them trains.

--init-adapter trains the units of an earlier adapter further.
"""

from functools import partial

import pytest
from cli.test_training_options import deltas, sft
from support.inside import overlap
from support.states import same

import s2ft


@pytest.fixture(scope="module")
def runs(work):
    """Three runs, each on top of the earlier ones. The first two have the default name."""
    sft(work, work / "first")
    sft(work, work / "second", "--on-top", work / "first", "--name", "b")
    sft(work, work / "third", "--on-top", work / "first", work / "second", "--name", "c")
    return [work / name for name in ("first", "second", "third")]


def test_each_run_trains_units_of_its_own_and_names_those_below(runs):
    adapters = [s2ft.read_adapter(run) for run in runs]
    assert overlap(adapters).units == 0
    below = [adapter.info.get("on_top_of") for adapter in adapters]
    assert below == [None, {"default": 1.0}, {"default": 1.0, "b": 1.0}]
    assert "on_top_of" not in (adapters[1] + adapters[0]).info  # the sum needs no other
    assert all(any(values.abs().max() > 0 for values in deltas(run).values()) for run in runs)


def test_a_run_on_top_is_resumed_exactly_and_only_with_the_same_adapters_below(runs, work, tmp_path, capsys):
    more = ("--on-top", work / "first", work / "second", "--name", "c")
    sft(work, tmp_path / "again", *more, "--stop-after", 2)
    assert sft(work, tmp_path / "again", "--name", "c", "--resume") != 0 and "on_top" in capsys.readouterr().err
    sft(work, tmp_path / "again", *more, "--resume")
    assert same(deltas(tmp_path / "again"), deltas(runs[2]))
    # alone it is a model that was never trained
    assert f"s2ft merge --adapter {tmp_path / 'again'}-whole" in capsys.readouterr().out


def test_equal_names_become_those_of_the_folders(work, tmp_path):
    sft(work, tmp_path / "a", "--seed", 1)
    sft(work, tmp_path / "b", "--on-top", tmp_path / "a")
    assert s2ft.read_adapter(tmp_path / "b").info["on_top_of"] == {"a": 1.0}


def test_an_adapter_is_trained_further_from_its_values_on_its_units(runs, work, tmp_path, capsys):
    further = partial(sft, work, trained=("--init-adapter", runs[0]))
    assert further(tmp_path / "still", rate=1e-30) == 0 == further(tmp_path / "on")
    assert same(deltas(tmp_path / "still"), deltas(runs[0])) and not same(deltas(tmp_path / "on"), deltas(runs[0]))
    assert further(tmp_path / "cut", "--stop-after", 2) == 0 == further(tmp_path / "cut", "--resume")
    assert same(deltas(tmp_path / "cut"), deltas(tmp_path / "on"))
    assert further(tmp_path / "no", "--d-ratio", 0.1, "--selection-seed", 3, "--on-top", runs[1]) == 2
    assert "leave out d_ratio, on_top, selection_seed" in capsys.readouterr().err
    assert further(runs[0], "--overwrite") == 2 and "another --output" in capsys.readouterr().err
    assert sft(work, runs[0], "--on-top", runs[0], "--overwrite") == 2 and "another" in capsys.readouterr().err
