"""`exclude`: units that must not be selected. `units`: a selection by hand."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.models import ALL_RATIOS, model_of, train

import s2ft
from s2ft import S2FTConfig
from s2ft.attached.record import attachment_of
from s2ft.selection import METRICS

DOWN, UP, GATE = (f"model.layers.1.mlp.{name}_proj" for name in ("down", "up", "gate"))


@pytest.mark.parametrize("allocation", ("uniform", "global"))
@pytest.mark.parametrize("metric", METRICS)
def test_a_second_selection_excludes_the_first(metric, allocation):
    model = model_of("llama")
    data = [torch.arange(16).view(2, 8)] if METRICS[metric].calibrated else None
    options = dict(**ALL_RATIOS, selection=metric, allocation=allocation)
    options["v_ratio"] = 0.5
    first = s2ft.select(model, S2FTConfig(**options), data)
    second = s2ft.select(model, S2FTConfig(**options, exclude=first), data)
    for path, units in second.units.items():
        taken = set(first.units.get(path, torch.tensor([])).tolist())
        assert not taken & set(units.tolist()), path
    assert sum(map(len, second.units.values())) == sum(map(len, first.units.values()))
    for i in range(3):  # the producers are still nested
        up, gate = (
            set(second.units.get(f"model.layers.{i}.mlp.{name}_proj", torch.tensor([])).tolist())
            for name in ("up", "gate")
        )
        assert up >= gate


@settings(deadline=None, max_examples=30)
@given(excluded=st.sets(st.integers(0, 51), min_size=1, max_size=40), ratio=st.floats(0.02, 0.2))
def test_excluded_units_are_never_selected(excluded, ratio):
    model = model_of("llama")
    config = S2FTConfig(d_ratio=ratio, exclude={DOWN: sorted(excluded)})
    units = s2ft.select(model, config)[DOWN]
    assert not excluded & set(units.tolist()) and units.numel() == int(ratio * 52 + 0.5)
    rest = s2ft.select(model, S2FTConfig(d_ratio=ratio, exclude={DOWN: sorted(excluded)}, budget=100 * 24))
    assert not excluded & set(rest[DOWN].tolist()) and sum(map(len, rest.units.values())) == 100


def test_excluding_an_adapter(tmp_path):
    model = model_of("llama")
    s2ft.attach(model, S2FTConfig(**ALL_RATIOS))
    train(model)
    first = attachment_of(model).selection
    s2ft.save_adapter(model, tmp_path / "first")
    s2ft.detach(model)
    first.save(tmp_path / "first.json")
    chosen = []
    for where in (tmp_path / "first", str(tmp_path / "first.json"), first, first.units, first.to_dict()):
        config = S2FTConfig(d_ratio=0.15, u_ratio=0.2, exclude=where)
        chosen.append(s2ft.select(model, config))
        assert not set(first[DOWN].tolist()) & set(chosen[-1][DOWN].tolist())
    assert all(selection == chosen[0] for selection in chosen)
    s2ft.attach(model, config)
    s2ft.save_adapter(model, tmp_path / "second")
    assert s2ft.adapter.read_adapter(tmp_path / "second").config == config


def test_excluding_too_many_units_raises():
    model = model_of("llama")
    exclude = {DOWN: list(range(50))}
    with pytest.raises(ValueError, match=f"exclude leaves 2 channels of {DOWN} to choose from; 5 are requested"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, exclude=exclude))
    everything = {f"model.layers.{i}.mlp.down_proj": list(range(50)) for i in range(3)}
    with pytest.raises(ValueError, match="exclude leaves 6 channels of the layers' d projections.*15 are requested"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, exclude=everything, selection="weight", allocation="global"))
    with pytest.raises(ValueError, match="more than the 144 parameters"):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, exclude=everything, budget=145))
    assert s2ft.status(model).adapters == []


@pytest.mark.parametrize("layout", ("permuted", "indexed"))
def test_units_by_hand(layout, tmp_path):
    """A selection that is unsorted, not nested, and has a single projection of one layer trains, saves and loads."""
    units = {DOWN: [7, 3, 51], UP: [0, 1, 2], GATE: [2, 40], "model.layers.2.self_attn.o_proj": [3]}
    model = model_of("llama")
    base = copy.deepcopy(model.state_dict())
    s2ft.attach(model, S2FTConfig(units=units, layout=layout))
    assert attachment_of(model).selection.to_dict() == {path: sorted(numbers) for path, numbers in units.items()}
    train(model)
    s2ft.save_adapter(model, tmp_path / "a")
    merged = s2ft.merge(copy.deepcopy(model)).state_dict()
    moved = (merged[f"{GATE}.weight"] != base[f"{GATE}.weight"]).any(1).nonzero().squeeze(1)
    assert moved.tolist() == [2, 40]
    other = model_of("llama")
    s2ft.load_adapter(other, tmp_path / "a", trainable=True)
    assert all(torch.equal(value, merged[key]) for key, value in s2ft.merge(other).state_dict().items())
    again = s2ft.select(model_of("llama"), S2FTConfig(units=tmp_path / "a"))
    assert again == attachment_of(model).selection


@pytest.mark.parametrize(
    "units,message",
    [
        ({DOWN: [52]}, f"units: {DOWN} has 52 channels, from 0; there is no 52"),
        ({"model.layers.0.self_attn.q_proj": [4]}, "has 4 heads, from 0; there is no 4"),
        ({DOWN: [1, 1]}, f"units: {DOWN} names a unit twice"),
        ({DOWN: [-1]}, f"units: {DOWN} must have a list of unit numbers from 0"),
        ({DOWN: []}, f"units: {DOWN} must have a list of unit numbers from 0, and at least one"),
        ({DOWN: "123"}, f"units: {DOWN} must have a list"),
        ({DOWN: 3}, f"units: {DOWN} must have a list"),
        ({DOWN: [1.0]}, f"units: {DOWN} must have a list"),
        ({}, "units must give lists of unit numbers by module path, and at least one"),
        ({"model.layers.9.mlp.down_proj": [1]}, "units names model.layers.9.mlp.down_proj, which is not a projection"),
        ({"lm_head": [1]}, "units names lm_head, which is not a projection of this model"),
    ],
)
def test_wrong_units_raise(units, message):
    model = model_of("llama")
    with pytest.raises(ValueError, match=message):
        s2ft.attach(model, S2FTConfig(units=units))
    message = (
        message.replace("units:", "exclude:")
        .replace("units names", "exclude names")
        .replace("units must", "exclude must")
    )
    with pytest.raises(ValueError, match=message):
        s2ft.attach(model, S2FTConfig(d_ratio=0.1, exclude=units))
    assert s2ft.status(model).adapters == []


@pytest.mark.parametrize(
    "options",
    [
        dict(d_ratio=0.1),
        dict(selection="weight"),
        dict(order="smallest"),
        dict(layers=[1]),
        dict(budget=9),
        dict(match_lora_rank=9),
        dict(exclude={DOWN: [1]}),
        dict(selection="weight", allocation="global"),
    ],
)
def test_units_by_hand_exclude_options_that_select(options):
    with pytest.raises(ValueError, match=f"nothing is left for {', '.join(options)}"):
        S2FTConfig(units={DOWN: [1]}, **options)


def test_units_by_hand_refuse_calibration_and_other_types():
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        s2ft.attach(model_of("llama"), S2FTConfig(units={DOWN: [1]}), calibration=[torch.ones(1, 4).long()])
    for option in ("units", "exclude"):
        with pytest.raises(ValueError, match=f"{option} must be a selection, .*got list"):
            S2FTConfig(**{option: [1, 2]})
    with pytest.raises(FileNotFoundError):
        s2ft.attach(model_of("llama"), S2FTConfig(units="nowhere.json"))
