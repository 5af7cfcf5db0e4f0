"""The number of units that ratios and budgets select, and how it is allocated to the layers."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support.inside import couplings_of, projections_of, record_of, unit_parameters
from support.models import model_of

import s2ft
from s2ft import S2FTConfig

MODEL = model_of("llama-grouped")
PROJECTIONS = {p.path: p for p in projections_of(couplings_of(MODEL))}
COSTS = {path: unit_parameters(MODEL, p) for path, p in PROJECTIONS.items()}


def parameters(selection):
    return sum(COSTS[path] * units.numel() for path, units in selection.units.items())


def per_layer(selection, name):
    return [units.numel() for path, units in selection.units.items() if path.endswith(name)]


@settings(deadline=None, max_examples=60)
@given(
    ratios=st.fixed_dictionaries({f"{key}_ratio": st.one_of(st.just(0.0), st.floats(0.05, 1)) for key in "qvoud"}),
    budget=st.integers(1, 30000),
    layers=st.sets(st.integers(0, 2), min_size=1),
    allocation=st.sampled_from(["uniform", "global"]),
)
def test_a_budget_is_never_exceeded_and_missed_by_less_than_a_unit(ratios, budget, layers, allocation):
    config = S2FTConfig(**ratios, budget=budget, layers=sorted(layers), allocation=allocation, selection="weight")
    try:
        selection = s2ft.select(MODEL, config)
    except ValueError as error:
        assert any(words in str(error) for words in ("is too small", "is more than the", "nothing is selected"))
        return
    spent = parameters(selection)
    requested = [p for p in PROJECTIONS.values() if p.key in config.ratios and int(p.path.split(".")[2]) in layers]
    totals = {p.key: [0, 0] for p in requested}
    for p in requested:
        totals[p.key][0] += len(selection[p.path]) if p.path in selection else 0
        totals[p.key][1] += p.count
    room = [COSTS[p.path] for p in requested if totals[p.key][0] < totals[p.key][1]]
    assert spent <= budget and (spent == budget or budget - spent < min(room))
    if allocation == "uniform":
        assert {p.path for p in requested} == set(selection.units)
        for key in totals:
            sizes = [len(selection[p.path]) for p in requested if p.key == key]
            assert max(sizes) - min(sizes) <= 1


def test_a_budget_keeps_the_proportions_of_the_ratios():
    selection = s2ft.select(MODEL, S2FTConfig(u_ratio=0.1, d_ratio=0.2, budget=24 * 3 * 30))
    assert per_layer(selection, "up_proj") == [10] * 3 and per_layer(selection, "down_proj") == [20] * 3


def test_a_budget_as_text_and_as_the_rank_of_a_lora():
    units = 3 * 10 * 24
    assert {S2FTConfig(d_ratio=1, budget=one).budget for one in (units, str(units), "0.72K", "0.00072 m")} == {units}
    assert S2FTConfig(d_ratio=1, budget="9.2M").budget == 9_200_000
    model = model_of("llama-grouped")
    report = s2ft.attach(model, S2FTConfig(u_ratio=0.1, d_ratio=0.1, match_lora_rank=4))
    lora = 2 * 3 * 4 * (24 + 52)  # two projections in three layers
    assert lora - 24 < report.trainable <= lora and report.trainable == parameters(record_of(model).selection)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- over the layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ("largest", "smallest"))
def test_global_selects_the_best_units_of_all_layers(order):
    config = S2FTConfig(u_ratio=0.1, g_ratio=0.2, d_ratio=0.1, selection="weight", order=order, allocation="global")
    selection = s2ft.select(MODEL, config)
    norms = torch.cat(
        [MODEL.get_submodule(f"model.layers.{i}.mlp.down_proj").weight.detach().double().norm(dim=0) for i in range(3)]
    )
    best = set(norms.sort(descending=order == "largest").indices[:15].tolist())  # 5 of 52 in each of 3 layers
    assert best == {
        i * 52 + unit
        for i in range(3)
        for unit in selection.units.get(f"model.layers.{i}.mlp.down_proj", torch.tensor([])).tolist()
    }
    for i in range(3):
        up, gate = (
            set(selection.units.get(f"model.layers.{i}.mlp.{name}_proj", torch.tensor([])).tolist())
            for name in ("up", "gate")
        )
        assert up <= gate


def test_a_layer_without_selected_units_is_not_mounted():
    model = model_of("llama")
    for i in (0, 2):
        model.model.layers[i].mlp.down_proj.weight.data.mul_(1e-3)
    for layout in ("permuted", "indexed"):
        report = s2ft.attach(model, S2FTConfig(d_ratio=0.1, selection="weight", allocation="global", layout=layout))
        assert list(record_of(model).mounts) == ["model.layers.1.mlp.down_proj"] and report.trainable == 15 * 24
        s2ft.detach(model)


def test_align_rounds_numbers_down_and_keeps_fewer_heads_whose_elements_are_a_multiple():
    config = {"d_ratio": 0.36, "o_ratio": 0.25, "selection": "weight"}
    plain, aligned = s2ft.select(MODEL, S2FTConfig(**config)), s2ft.select(MODEL, S2FTConfig(**config, align=2))
    for path, units in plain.units.items():
        number = units.numel()
        assert aligned[path].numel() == (number - number % 2 if number >= 2 else number)
        assert set(aligned[path].tolist()) <= set(units.tolist())
    assert any(aligned[path].numel() < units.numel() for path, units in plain.units.items())


@pytest.mark.parametrize("size", [{"d_ratio": 0.35}, {"d_ratio": 1.0, "budget": 600}])
def test_align_above_the_number_of_units_is_an_error(size):
    with pytest.raises(ValueError, match="align=64 can't be met: .*down_proj would train .* units"):
        s2ft.select(MODEL, S2FTConfig(**size, align=64))
