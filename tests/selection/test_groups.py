"""Units in groups of neighbouring inputs."""

import pytest
import torch
from support.inside import couplings_of, projections_of
from support.models import model_of

import s2ft
from s2ft import S2FTConfig

MODEL = model_of("llama")
PROJECTIONS = {projection.name: projection for projection in projections_of(couplings_of(MODEL))}
DOWN, OUT = "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.o_proj"
CHANNELS = PROJECTIONS[DOWN.format(0)].count
RATIOS = {"d_ratio": 0.25, "o_ratio": 0.5, "u_ratio": 0.25}


def in_groups(units, size):
    return torch.equal(units, (units[::size, None] // size * size + torch.arange(size)).flatten())


@pytest.mark.parametrize("more", [{}, {"allocation": "global"}, {"layers": [1]}, {"budget": 3000}], ids=str)
def test_inputs_come_in_whole_groups_and_outputs_one_by_one(more):
    plain = s2ft.select(MODEL, S2FTConfig(**RATIOS, **more))
    found = s2ft.select(MODEL, S2FTConfig(**RATIOS, **more, group=2))
    assert found.units and found == s2ft.select(MODEL, S2FTConfig(**RATIOS, **more, group=2))
    for path, units in found.units.items():
        if path.endswith("down_proj"):
            assert in_groups(units, 2)
        elif path.endswith("up_proj") and "budget" not in more:
            assert torch.equal(units, plain[path])


def test_a_group_has_the_score_of_all_its_inputs():
    found = s2ft.select(MODEL, S2FTConfig(d_ratio=4 / CHANNELS, selection="weight", group=4))
    for layer in range(2):
        best = int(MODEL.model.layers[layer].mlp.down_proj.weight.square().sum(0).view(-1, 4).sum(1).argmax())
        assert found[DOWN.format(layer)].tolist() == list(range(4 * best, 4 * best + 4))


def test_excluded_units_take_their_group_with_them():
    path = DOWN.format(0)
    config = S2FTConfig(
        d_ratio=4 / CHANNELS, group=4, layers=[0], exclude={path: list(range(0, CHANNELS - 4, 4))}
    )  # one of each group but the last
    assert s2ft.select(MODEL, config)[path].tolist() == list(range(CHANNELS - 4, CHANNELS))


def test_a_head_of_whole_groups_is_a_unit_and_heads_make_a_group():
    o = PROJECTIONS[OUT.format(0)]
    plain = s2ft.select(MODEL, S2FTConfig(o_ratio=0.5))
    assert s2ft.select(MODEL, S2FTConfig(o_ratio=0.5, group=o.unit // 2)) == plain
    pairs = s2ft.select(MODEL, S2FTConfig(o_ratio=0.5, group=2 * o.unit))
    assert all(in_groups(units, 2) for units in pairs.units.values())


def test_a_plan_counts_groups():
    report = s2ft.plan(MODEL, S2FTConfig(d_ratio=0.25, group=4))
    assert report.trainable == s2ft.attach(model_of("llama"), S2FTConfig(d_ratio=0.25, group=4)).trainable
